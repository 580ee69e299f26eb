"""``fedmerge report``: write one HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import TrustRemoteCode, app


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run directories, finished or not.")
    ],
    out: Annotated[
        Path, typer.Option(help="HTML file to write; an existing one is overwritten.")
    ] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the figures as PNG and SVG files; existing ones are overwritten."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML page about runs: figures, worst clients, advice.

    The page works offline and on a phone.

    Example: fedmerge report runs/first --out first.html
    """
    from fedmerge_peft.report.page import write_figures, write_report
    from fedmerge_peft.runs.directory import RunDirectory
    from fedmerge_peft.util.text import printable

    opened = [RunDirectory.open(run, trust_remote_code=trust_remote_code) for run in runs]
    print(printable(f"wrote {write_report(opened, out)}"))
    if figures is not None:
        print(printable(f"wrote {len(write_figures(opened, figures))} files to {figures}"))

"""``fedmerge report``: a page to read, and to send to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import app


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run directories, finished or not.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write; overwritten.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None,
        typer.Option(help="A folder for the figures as PNG and SVG files too; overwritten."),
    ] = None,
) -> None:
    """Write one HTML page about runs: figures, worst clients, what to do.

    It needs no network, and fits a phone.

    Example: fedmerge report runs/first --out first.html
    """
    from fedmerge_peft.report.page import write_figures, write_report
    from fedmerge_peft.util.text import printable

    print(printable(f"wrote {write_report(runs, out)}"))
    if figures is not None:
        print(printable(f"wrote {len(write_figures(runs, figures))} files into {figures}"))

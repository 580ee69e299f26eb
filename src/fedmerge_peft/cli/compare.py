"""``fedmerge compare``: finished runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import app

if TYPE_CHECKING:
    from rich.console import Console

    from fedmerge_peft.analysis import Comparison

_WIDTH = 120
"""Characters of a table that no terminal limits."""


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Run directories, or folders that hold some at any depth."
        ),
    ],
    target: Annotated[
        float | None,
        typer.Option(help="The score to count rounds to; by default fedavg's final one, by seed."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="The score to compare, such as test_f1; by default the one the runs report."
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write the table to this file too, in full precision; overwritten."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write it as Markdown too; overwritten.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw it to this .png, .svg or .pdf file; overwritten.")
    ] = None,
) -> None:
    """Compare methods over seeds: scores, worst clients, gains, bytes, seconds.

    Runs that differ only in their seed are one method. Runs on different data, tasks or backbones get tables of their own.

    Example: fedmerge compare runs sweeps/quickstart --figure methods.png
    """
    from rich.console import Console

    from fedmerge_peft.analysis import Comparison
    from fedmerge_peft.analysis.figures import check_suffix, plot
    from fedmerge_peft.analysis.reports import markdown as as_markdown
    from fedmerge_peft.util.logs import configure_logging
    from fedmerge_peft.util.text import printable

    if figure is not None:
        check_suffix(figure)
    console = wide_console()
    configure_logging(Console(stderr=True, highlight=False))
    comparison = Comparison.of(runs, metric=metric, target=target)
    show(comparison, console)
    if csv is not None:
        _write(csv, comparison.methods.to_csv(index=False))
    if markdown is not None:
        _write(markdown, as_markdown(comparison))
    if figure is not None:
        plot(comparison, figure)
    for path in (csv, markdown, figure):
        if path is not None:
            console.print(printable(f"wrote {path}"), markup=False, soft_wrap=True)


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables, with as many columns as the terminal has room for."""
    from fedmerge_peft.analysis.reports import tables

    for part in tables(comparison, console.width):
        console.print(part)


def wide_console() -> Console:
    """Standard output, and not 80 characters wide where it is no terminal."""
    import os

    from rich.console import Console

    console = Console(highlight=False)
    return (
        console
        if console.is_terminal or "COLUMNS" in os.environ
        else Console(highlight=False, width=_WIDTH)
    )


def _write(path: Path, text: str) -> None:
    from fedmerge_peft.errors import RunError

    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error

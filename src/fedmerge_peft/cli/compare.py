"""``fedmerge compare``: tables and a figure of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import TrustRemoteCode, app, write_file

if TYPE_CHECKING:
    from rich.console import Console

    from fedmerge_peft.analysis import Comparison

_WIDTH = 120
"""Width in characters of tables that are not printed to a terminal."""


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Run directories, or folders with run directories at any depth."
        ),
    ],
    target: Annotated[
        float | None,
        typer.Option(
            help="Count the rounds until the mean score stays at this value or better. Default: "
            "fedavg's final score on the same seed."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Score to compare, such as test_f1. Default: the runs' main metric."),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write all methods to this CSV file in full precision; overwritten."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this Markdown file; overwritten.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw a figure to this .png, .svg or .pdf file; overwritten."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare methods over seeds: scores, worst clients, gains over local and fedavg, costs.

    Runs count as one method if they differ only in seed, name, baselines, evaluation, reporting,
    device and speed options. Runs with different data, tasks or backbones are listed in separate
    tables.

    Example: fedmerge compare runs sweeps/quickstart --figure methods.png
    """
    from rich.console import Console

    from fedmerge_peft.analysis import Comparison
    from fedmerge_peft.analysis.comparison import find_runs
    from fedmerge_peft.analysis.reports import as_csv
    from fedmerge_peft.analysis.reports import markdown as as_markdown
    from fedmerge_peft.plotting.render import check_suffix
    from fedmerge_peft.util.logs import configure_logging
    from fedmerge_peft.util.text import printable

    if figure is not None:
        check_suffix(figure)
    console = wide_console()
    configure_logging(Console(stderr=True, highlight=False))
    directories = find_runs(runs, trust_remote_code=trust_remote_code)
    comparison = Comparison.of(directories, metric=metric, target=target)
    print_tables(comparison, console)
    if csv is not None:
        write_file(csv, as_csv(comparison))
    if markdown is not None:
        write_file(markdown, as_markdown(comparison))
    if figure is not None:
        comparison.plot().save(figure)
    for path in (csv, markdown, figure):
        if path is not None:
            console.print(printable(f"wrote {path}"), markup=False, soft_wrap=True)


def print_tables(comparison: Comparison, console: Console) -> None:
    """Print the tables of a comparison, with as many columns as fit into the console's width."""
    from fedmerge_peft.analysis.reports import tables

    for part in tables(comparison, console.width):
        console.print(part)


def wide_console() -> Console:
    """Return a console on standard output. Its width is 120 characters outside a terminal.

    The environment variable ``COLUMNS`` takes precedence.
    """
    import os

    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=_WIDTH)

"""``fedmerge sweep``: one run per combination of values."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import RecipeSource, app

if TYPE_CHECKING:
    from rich.console import Console

    from fedmerge_peft.api import Run
    from fedmerge_peft.cli.stopping import Stop
    from fedmerge_peft.recipe import Recipe

Values = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=A,B,C", help="Values to combine, such as strategy.adapters=3,6 seed=0,1,2."
    ),
]


@app.command()
def sweep(
    recipe: RecipeSource,
    values: Values = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run directories. Default: sweeps/NAME.")
    ] = None,
) -> None:
    """Run every combination of the given values, then compare the runs.

    Commas in brackets, braces and quotes belong to the value. The recipe's baselines run once for
    each combination of the other values. Repeating the command continues the sweep: finished runs
    are kept and interrupted ones are resumed.

    Example: fedmerge sweep quickstart strategy.adapters=3,5 seed=0,1,2
    """
    from fedmerge_peft.recipe.grid import expand

    recipes = expand(recipe, values or [])

    from rich.console import Console

    from fedmerge_peft.analysis import Comparison
    from fedmerge_peft.api import Run
    from fedmerge_peft.cli.compare import print_tables, wide_console
    from fedmerge_peft.cli.stopping import Stop
    from fedmerge_peft.errors import RunError, SweepError
    from fedmerge_peft.util.logs import configure_logging
    from fedmerge_peft.util.text import printable

    directory = (
        out
        if out is not None
        else Path("sweeps", Run.default_path(next(iter(recipes.values()))).name)
    )
    console = wide_console()
    configure_logging(Console(stderr=True, highlight=False))
    failed = None
    try:
        with Stop() as stop:
            finished = [run.path for run in _sweep(recipes, directory, console, stop).values()]
    except KeyboardInterrupt as interrupt:
        print("stopped; repeat the command to continue the sweep", file=sys.stderr)
        raise typer.Exit(getattr(interrupt, "code", 130)) from None
    except SweepError as error:
        failed, finished = (
            error,
            [directory / name for name in recipes if name not in error.failures],
        )
    if finished:
        try:
            print_tables(Comparison.of(finished), console)
        except RunError as error:  # such as runs with different metrics; the sweep itself succeeded
            console.print(printable(f"no comparison: {error}"), markup=False, soft_wrap=True)
    if failed is not None:
        raise failed
    command = f"fedmerge compare {shlex.quote(str(directory))} --figure methods.png"
    console.print(f"next:\n  {printable(command)}", soft_wrap=True, markup=False)


def _sweep(
    recipes: dict[str, Recipe], directory: Path, console: Console, stop: Stop
) -> dict[str, Run]:
    """Run the recipes and print one line per run that ends."""
    from itertools import count

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from fedmerge_peft.api import sweep
    from fedmerge_peft.errors import FedMergeError
    from fedmerge_peft.runs.record import RoundRecord
    from fedmerge_peft.util.text import printable

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        rounds = progress.add_task("", total=None)
        ended = count(1)

        def print_result(name: str, result: str) -> None:
            progress.console.print(
                printable(f"[{next(ended)}/{len(recipes)}] {name}  {result}"),
                soft_wrap=True,
                markup=False,
            )

        def on_run(name: str, run: Run, fresh: bool) -> None:
            summary = run.summary
            served = summary["final"]["served"]
            scores = (
                f"served {served['mean']:.3f} (worst client {served['worst_client_score']:.3f})  "
                if served
                else ""
            )
            duration = f"{summary['seconds']:.1f} s" if fresh else "finished before"
            print_result(name, scores + duration)
            stop.check()

        def on_failure(name: str, error: FedMergeError) -> None:
            print_result(name, f"failed: {str(error).splitlines()[0]}")

        def on_round(name: str, record: RoundRecord) -> None:
            if not console.is_terminal:  # a log, without a bar
                console.print(printable(f"{name}  {record}"), soft_wrap=True, markup=False)
            progress.update(
                rounds, description=printable(name), completed=record.round, total=record.rounds
            )
            stop.arm()
            stop.check()

        return sweep(recipes, directory, on_run=on_run, on_failure=on_failure, on_round=on_round)

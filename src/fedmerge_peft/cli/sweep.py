"""``fedmerge sweep``: run a recipe for each combination of values."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import RecipeSource, app
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from fedmerge_peft.api import Run
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
        Path | None,
        typer.Option(
            help="Folder of the run directories. Default: sweeps/NAME (the recipe's name)."
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Runs at a time, each in a process with its share of the CPU cores.",
        ),
    ] = 1,
) -> None:
    """Run every combination of the given values, then compare the runs.

    Commas in brackets, braces and quotes belong to the value. The recipe's baselines run once for
    each combination of the values outside the sections strategy and baselines. Repeating the
    command continues the sweep: finished runs are kept and interrupted ones are resumed.

    Example: fedmerge sweep quickstart strategy.adapters=3,5 seed=0,1,2
    """
    from fedmerge_peft.recipe.grid import expand

    recipes = expand(recipe, values or [])

    from rich.console import Console

    from fedmerge_peft.analysis import Comparison
    from fedmerge_peft.api import Run
    from fedmerge_peft.cli.compare import print_tables, wide_console
    from fedmerge_peft.cli.sweep_jobs import run_jobs
    from fedmerge_peft.errors import RunError, SweepError
    from fedmerge_peft.util.logs import configure_logging

    directory = (
        out
        if out is not None
        else Path("sweeps", Run.default_path(next(iter(recipes.values()))).name)
    )
    console = wide_console()
    configure_logging(Console(stderr=True, highlight=False))
    failed = None
    screen = _Screen(console, len(recipes))
    try:
        with screen.progress:
            if min(jobs, len(recipes)) > 1:
                count = min(jobs, len(recipes))
                finished = run_jobs(count, recipe, values or [], list(recipes), directory, screen)
            else:
                finished = _run(recipes, directory, screen)
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
        except RunError as error:  # such as different metrics; not a failure of the sweep
            console.print(printable(f"no comparison: {error}"), markup=False, soft_wrap=True)
    if failed is not None:
        raise failed
    command = f"fedmerge compare {shlex.quote(str(directory))} --figure methods.png"
    console.print(f"next:\n  {printable(command)}", soft_wrap=True, markup=False)


def _run(recipes: dict[str, Recipe], directory: Path, screen: _Screen) -> list[Path]:
    """Run the recipes one after another in this process; return the run directories."""
    from fedmerge_peft.api import sweep
    from fedmerge_peft.cli.stopping import Stop
    from fedmerge_peft.cli.sweep_jobs import result_of
    from fedmerge_peft.errors import FedMergeError
    from fedmerge_peft.runs.record import RoundRecord

    def on_run(name: str, run: Run, fresh: bool) -> None:
        screen.ended(name, result_of(run, fresh))
        stop.check()

    def on_failure(name: str, error: FedMergeError) -> None:
        screen.ended(name, f"failed: {str(error).splitlines()[0]}")

    def on_round(name: str, record: RoundRecord) -> None:
        screen.round(name, record.round, record.rounds, str(record))
        stop.arm()
        stop.check()

    with Stop() as stop:
        runs = sweep(recipes, directory, on_run=on_run, on_failure=on_failure, on_round=on_round)
    return [run.path for run in runs.values()]


class _Screen:
    """Progress display: a bar for each active run on a terminal, otherwise a line per round."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._terminal = console.is_terminal
        self._total = total
        self._ended = 0
        self._bars: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def round(self, name: str, completed: int, total: int, record: str) -> None:
        if not self._terminal:
            self._print(f"{name}  {record}")
            return
        if name not in self._bars:
            self._bars[name] = self.progress.add_task(printable(name))
        self.progress.update(self._bars[name], completed=completed, total=total)

    def ended(self, name: str, result: str) -> None:
        if (bar := self._bars.pop(name, None)) is not None:
            self.progress.remove_task(bar)
        self._ended += 1
        self._print(f"[{self._ended}/{self._total}] {name}  {result}")

    def _print(self, line: str) -> None:
        self.progress.console.print(printable(line), soft_wrap=True, markup=False)

"""``fedmerge scores``: print the tables that ``fedmerge run`` prints at the end of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import TrustRemoteCode, app

if TYPE_CHECKING:
    from rich.console import Console

    from fedmerge_peft.runs.directory import RunDirectory


@app.command()
def scores(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print the final scores and merging weights of a finished run, and a command to repeat it.

    Example: fedmerge scores runs/first
    """
    from rich.console import Console

    from fedmerge_peft.errors import RunError
    from fedmerge_peft.federation.tuning import describe
    from fedmerge_peft.runs.directory import RunDirectory
    from fedmerge_peft.util.text import printable

    directory = RunDirectory.open(run, trust_remote_code=trust_remote_code)
    if command := directory.resume_command:
        raise RunError(f"{run} has not ended; continue it with: {command}")
    console = Console(highlight=False)
    print_tables(directory, console)
    again = ["fedmerge", "run", str(run / "recipe.yaml"), "--out", str(RunDirectory.free_path(run))]
    for line in (
        *describe(directory.decisions),
        f"run directory: {run}",
        f"to run it again: {shlex.join(again)}",
    ):
        console.print(printable(line), soft_wrap=True, markup=False)


def print_tables(run: RunDirectory, console: Console) -> None:
    """Print the scores of a finished run and its baselines, if it has any.

    If the strategy learns to merge several adapters, print the merging weights π too.
    """
    from fedmerge_peft.analysis import scores_table, weights_table

    if run.summary["final"]["served"] is not None:
        console.print(scores_table(run))
    if run.recipe.strategy.learned_merging and len(run.soup) > 1:
        console.print(weights_table(run))

"""``fedmerge run`` and ``fedmerge resume``: run a recipe, and resume an interrupted run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, TrustRemoteCode, app
from fedmerge_peft.cli.workers import Workers, number_of_workers, run_on_workers
from fedmerge_peft.distributed import destroy_process_group, is_main

if TYPE_CHECKING:
    from rich.console import Console

    from fedmerge_peft.api import Run
    from fedmerge_peft.cli.stopping import Stop
    from fedmerge_peft.federation.loop import Federation
    from fedmerge_peft.runs.directory import RunDirectory
    from fedmerge_peft.runs.record import RoundRecord
    from fedmerge_peft.strategies import Reply
    from fedmerge_peft.util.profiling import PhaseTimer


@app.command()
def run(
    recipe: RecipeSource,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New or empty run directory. Default: runs/NAME (the recipe's name)."),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Omit the progress bars and the tables at the end."),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print a breakdown of the rounds' time at the end.")
    ] = False,
    workers: Workers = "1",
) -> None:
    """Run a recipe's federation and its baselines.

    The lines of evaluated rounds show the scores of the adapters at the start of the round
    (served), and of the same adapters after local training (finetuned, unless evaluation.finetuned
    is false). The line after the last round shows the scores of the final adapters.

    Example: fedmerge run quickstart rounds=5 --out runs/first
    """
    from fedmerge_peft.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])

    from rich.console import Console

    from fedmerge_peft.api import Run, federate
    from fedmerge_peft.errors import RunExistsError
    from fedmerge_peft.util.logs import configure_logging
    from fedmerge_peft.util.profiling import collect_timings

    directory = out if out is not None else Run.default_path(loaded)
    try:
        Run.check_free(directory)
    except RunExistsError as error:
        command = shlex.join(
            ["fedmerge", "run", recipe, *(overrides or []), "--out", str(error.free)]
        )
        raise RunExistsError(f"{error}\n  {command}", error.free) from None
    if (count := number_of_workers(workers, loaded.training.device)) > 1:
        options = ["--out", str(directory), *["--quiet"] * quiet, *["--profile"] * profile]
        run_on_workers(count, ["run", *options, "--", recipe, *(overrides or [])])
        return
    console = Console(highlight=False, quiet=not is_main())
    configure_logging(Console(stderr=True, highlight=False), engines_only=not is_main())
    with collect_timings() as timer:
        opened = Run(directory, trust_remote_code=True)
        finished = _run_stoppable(partial(federate, loaded, directory), opened, console, quiet)
    destroy_process_group()
    if not quiet and is_main():
        _print_results(finished, recipe, overrides or [], console)
    if profile:
        _print_profile(timer, console)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Overrides of name, rounds, evaluation.every, stop.patience, stop.metric, "
            "tracking, callbacks or plugins.",
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Omit the progress bars and the tables at the end."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    workers: Workers = "1",
) -> None:
    """Resume an interrupted run, or extend a finished one by more rounds.

    The run continues from the last finished round. The result equals that of an uninterrupted run.

    Example: fedmerge resume runs/first rounds=10
    """
    from rich.console import Console

    from fedmerge_peft.api import Run, resume
    from fedmerge_peft.util.logs import configure_logging

    opened = Run.open(run, trust_remote_code=trust_remote_code)
    if (count := number_of_workers(workers, opened.recipe.training.device)) > 1:
        options = [*["--quiet"] * quiet, *["--trust-remote-code"] * trust_remote_code]
        run_on_workers(count, ["resume", *options, "--", str(run), *(overrides or [])])
        return
    console = Console(highlight=False, quiet=not is_main())
    configure_logging(Console(stderr=True, highlight=False), engines_only=not is_main())
    start = partial(resume, run, overrides or [], trust_remote_code=trust_remote_code)
    finished = _run_stoppable(start, opened, console, quiet)
    destroy_process_group()
    if not quiet and is_main():
        _print_results(finished, str(run / "recipe.yaml"), [], console)


def _run_stoppable(start: Callable[..., Run], run: Run, console: Console, quiet: bool) -> Run:
    """Run with a progress bar.

    If a signal stops the run, print the command that resumes it, and raise ``typer.Exit``. If the
    run fails in a way that resuming may repair, add the command to the error as a note. A run that
    cannot be resumed has no such command.
    """
    from fedmerge_peft.cli.stopping import Stop
    from fedmerge_peft.errors import (
        ClientError,
        RankError,
        ResumeError,
        RunBusyError,
        RunError,
        TooFewClientsError,
    )
    from fedmerge_peft.util.text import printable

    with Stop() as stop:
        try:
            return _run_with_progress(start, stop, console, quiet)
        except KeyboardInterrupt as interrupt:
            if is_main() and (command := run.resume_command):
                print(printable(f"stopped; resume with: {command}"), file=sys.stderr)
            raise typer.Exit(getattr(interrupt, "code", 130)) from None
        except (ClientError, RankError, RunError, TooFewClientsError) as error:
            if not isinstance(error, (ResumeError, RunBusyError)) and (
                command := run.resume_command
            ):
                error.add_note(f"To resume from the last finished round: {command}")
            raise


def _run_with_progress(start: Callable[..., Run], stop: Stop, console: Console, quiet: bool) -> Run:
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from fedmerge_peft.federation.callbacks import Callback
    from fedmerge_peft.util.text import printable

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as progress:
        rounds = progress.add_task("rounds", total=None)
        clients = progress.add_task("clients", total=None)

        class ShowProgress(Callback):
            """Update the progress bars, and print one line per round and one per decision."""

            def on_start(self, federation: Federation, run: RunDirectory) -> None:
                stop.check()
                stop.arm()
                strategy, count = federation.strategy, len(federation.engine.clients)
                megabytes = 4 * strategy.soup.layout.size / 1e6
                after = f", after round {federation.completed}" if federation.completed else ""
                progress.print(
                    f"[bold]{federation.recipe.strategy.name}[/]: "
                    f"{count} client{'s' * (count != 1)}, "
                    f"{len(strategy.soup)} adapter{'s' * (len(strategy.soup) > 1)} of "
                    f"{megabytes:.2f} MB on {federation.engine.backbone.device}{after}",
                    soft_wrap=True,
                )
                progress.reset(
                    rounds, total=federation.recipe.rounds, completed=federation.completed
                )
                progress.reset(clients, total=len(federation.cohort(1)))

            def on_client(self, reply: Reply) -> None:
                progress.advance(clients)

            def on_round(self, record: RoundRecord) -> None:
                progress.print(str(record), soft_wrap=True)
                for decision in record.decisions:
                    progress.print(printable(f"  {decision}"), soft_wrap=True, markup=False)
                if record.round == record.rounds:
                    for warning in record.warnings:
                        text = escape(printable(warning))
                        progress.print(f"[yellow]warning:[/] {text}", soft_wrap=True)
                progress.advance(rounds)
                progress.reset(clients)
                stop.check()

            def on_end(self, run: RunDirectory) -> None:
                if (final := run.last_scores) is not None:
                    progress.print(
                        f"after round {run.summary['rounds']}  served {final['mean']:.3f} "
                        f"(worst client {final['worst_client_score']:.3f})",
                        soft_wrap=True,
                    )

        return start(callbacks=[ShowProgress()])


def _print_results(run: Run, recipe: str, overrides: list[str], console: Console) -> None:
    from fedmerge_peft.cli.scores import print_tables
    from fedmerge_peft.util.text import printable

    print_tables(run, console)
    console.print(
        f"run directory: {printable(str(run.path))}\n\nnext:", soft_wrap=True, markup=False
    )
    for command, purpose in _next_commands(run, recipe, overrides):
        console.print(f"  {printable(command)}   # {purpose}", soft_wrap=True, markup=False)


def _print_profile(timer: PhaseTimer, console: Console) -> None:
    from rich.table import Table

    total = sum(timer.seconds.values())
    overhead = 100 * timer.overhead
    console.print(
        f"time by part; {overhead:.1f} % was spent on neither training nor evaluation",
        soft_wrap=True,
    )
    table = Table()
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in timer.seconds.items():
        table.add_row(part, f"{seconds:.2f}", f"{100 * seconds / total:.1f} %")
    console.print(table)


def _next_commands(run: Run, recipe: str, overrides: list[str]) -> list[tuple[str, str]]:
    """Return up to three suggestions of the next command, each with its purpose."""
    from fedmerge_peft.plugins import STRATEGIES
    from fedmerge_peft.recipe.loading import shipped
    from fedmerge_peft.report.advice import only_warm_rounds

    def rerun(override: str, suffix: str) -> str:
        out = f"{run.path}-{suffix}"
        key = override.partition("=")[0]
        others = [other for other in overrides if other.partition("=")[0].strip() != key]
        return shlex.join(["fedmerge", "run", recipe, *others, override, "--out", out])

    commands = [
        (f"fedmerge report {shlex.quote(str(run.path))}", "figures, the worst clients, advice")
    ]
    if run.recipe.strategy.learned_merging:
        adapters = len(run.soup)
        if only_warm_rounds(run):
            rounds = 2 * run.recipe.strategy.rounds_with_one_adapter
            longer = shlex.join(["fedmerge", "resume", str(run.path), f"rounds={rounds}"])
            commands.append((longer, "clients are grouped after the warm rounds"))
        elif adapters > 1:
            fewer = (adapters + 1) // 2
            commands.append((rerun(f"strategy.adapters={fewer}", str(fewer)), "a smaller soup"))
    else:
        sections = STRATEGIES.sections().items()
        merging = next(name for name, section in sections if section.learned_merging)
        commands.append((rerun(f"strategy={merging}", merging), "merged adapters instead"))
    if any(recipe == entry.name for entry in shipped()):
        commands.append((f"fedmerge cp {recipe} mine.yaml", "your own model and data"))
    else:
        another_seed = rerun(f"seed={run.recipe.seed + 1}", "seed")
        commands.append((another_seed, "the variation between seeds"))
    return commands

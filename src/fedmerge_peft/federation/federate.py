"""A whole recipe and its baselines into a run directory, from the start or on after an interruption.

Where a launcher has started several ranks, all of them do this in step (``distributed.py``); the first alone reads and
writes the directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmerge_peft import distributed
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.engines.distributed import load_engine
from fedmerge_peft.errors import RecipeError, ResumeError
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat
from fedmerge_peft.runs.checkpoint import FREE
from fedmerge_peft.runs.directory import Run, parts
from fedmerge_peft.runs.record import RoundRecord, Scores
from fedmerge_peft.runs.tracking import Tracking, check_trackers, tracking
from fedmerge_peft.runs.writer import RunWriter
from fedmerge_peft.strategies import Reply
from fedmerge_peft.util import profiling
from fedmerge_peft.util.files import held


def federate(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    engine: Engine | None = None,
    on_start: Callable[[Federation, Run], None] | None = None,
    on_client: Callable[[Reply], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Run:
    """Run a whole recipe, and its baselines, into a run directory.

    On several ranks all call this, callbacks are called on all, and what one raises, all do.

    Args:
        recipe: What to federate.
        out: The run directory; by default ``runs/<name>``. Baselines go to ``<out>/baselines/<strategy>``.
        engine: Loaded data and model to use; by default those that the recipe names.
        on_start: Called before the first round of the recipe's strategy and of each baseline.
        on_client: Called for each client's reply.
        on_round: Called after each round, once it is on disk.

    Returns:
        The run of the recipe's own strategy; ``run.baselines`` has the others.

    Raises:
        RunExistsError: The directory is not empty. Nothing was touched.
        RunBusyError: Another process is writing it. Nothing was touched.
        FedMergeError: Anything else the recipe got wrong; rounds already finished stay on disk, and ``resume`` goes on from them.
    """
    directory = Path(out) if out is not None else Run.default_path(recipe)
    check_trackers(recipe)
    Run.check_free(directory)
    engine = engine or load_engine(recipe)
    with ExitStack() as stack:
        distributed.first(partial(_hold, stack, directory))
        distributed.first(partial(Run.check_free, directory))
        _federate(recipe, directory, engine, on_start, on_client, on_round)
    return Run(directory)


def resume(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    engine: Engine | None = None,
    on_start: Callable[[Federation, Run], None] | None = None,
    on_client: Callable[[Reply], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Run:
    """Go on with a run that was interrupted, from its last finished round; what it gives is what it would have given without.

    On several ranks, which may be more or fewer than before, as ``federate``.

    Args:
        path: The run directory.
        overrides: ``rounds=N``, for more rounds than were asked for (also of a run that has ended) or fewer, or ``evaluation.every=N``.
        engine: Loaded data and model to use; by default those that the run's recipe names.
        on_start: Called before the first round that is left, of the recipe's strategy and of each baseline; not for those that have ended.
        on_client: Called for each client's reply.
        on_round: Called after each round, once it is on disk.

    Returns:
        The run, ended.

    Raises:
        RecipeError: Overrides of anything else, or fewer rounds than are done. Nothing was touched.
        ResumeError: The run has ended, or cannot go on: data, recipe or checkpoints are not what they were.
        RunBusyError: Another process is writing it. Nothing was touched.
        FedMergeError: As ``federate``.
    """
    run = Run.open(path)
    recipe = _continued(run, overrides)
    check_trackers(recipe)
    if distributed.launched() > 1:
        engine = engine or load_engine(recipe)  # the ranks come together first, so that all have seen the directory before it changes
    with ExitStack() as stack:
        distributed.first(partial(_hold, stack, run.path))
        distributed.first(partial(_check_unfinished, run, recipe.rounds))
        engine = engine or load_engine(recipe)
        distributed.first(run.tidy)
        _federate(recipe, run.path, engine, on_start, on_client, on_round)
    return Run(run.path)


def _hold(stack: ExitStack, directory: Path) -> None:
    stack.enter_context(held(directory))


def _check_unfinished(run: Run, rounds: int) -> None:
    if Run.open(run.path).ended and rounds == run.recipe.rounds:
        raise ResumeError(
            f"{run.path} has ended: all of its {rounds} rounds are done. For more of them: fedmerge resume {run.path} rounds=N"
        )


def _continued(run: Run, overrides: Iterable[str]) -> Recipe:
    """The run's recipe with these overrides. Raises ``RecipeError`` for those that a run cannot go on with."""
    recipe = run.recipe.replace(overrides)
    if other := [key for key in differing([flat(run.recipe), flat(recipe)]) if key not in FREE]:
        raise RecipeError(
            [f"{', '.join(other)}: clients would do something else than before, so this would be another run; start it with fedmerge run. "
             f"A run that goes on may change {', '.join(FREE)}"]
        )  # fmt: skip
    for _, path in parts(run.recipe, run.path):
        if (done := len(Run(path).records)) > recipe.rounds:
            raise RecipeError([f"rounds: {recipe.rounds} is fewer than the {done} that {path} has done"])
    return recipe


def _federate(
    recipe: Recipe,
    directory: Path,
    engine: Engine,
    on_start: Callable[[Federation, Run], None] | None,
    on_client: Callable[[Reply], None] | None,
    on_round: Callable[[RoundRecord], None] | None,
) -> None:
    """Do what is left of a recipe and its baselines, all of it or the rest."""
    for one, path in parts(recipe, directory):
        if distributed.first(partial(_has_ended, path, recipe.rounds)):
            continue
        federation = Federation(one, engine)
        run = distributed.everyone(partial(_open, path, one, federation))
        _catch_up(run, federation)
        with ExitStack() as stack:
            tracked = distributed.everyone(partial(_track, stack, one, path, engine))
            if on_start is not None:
                distributed.everyone(partial(on_start, federation, run))
            _finish(federation, run, tracked, on_client, on_round)


def _has_ended(path: Path, rounds: int) -> bool:
    return Run(path).rounds_ended == rounds


def _open(path: Path, recipe: Recipe, federation: Federation) -> RunWriter:
    """What writes the run; on other ranks than the first, nothing asks it to."""
    if not distributed.leads():
        return RunWriter(path, recipe)
    if (path / "recipe.yaml").is_file():
        return RunWriter.reopen(path, recipe, federation.engine, federation.strategy)
    return RunWriter.create(path, recipe, federation.engine)


def _catch_up(run: RunWriter, federation: Federation) -> None:
    """Go on where the run stopped; the first rank has read it."""
    strategy = federation.strategy
    records: list[dict[str, Any]] = distributed.first(lambda: run.records)
    if records and distributed.count() > 1:
        rows, base, state = distributed.first(lambda: (strategy.soup.rows, dict(strategy.soup.base), strategy.state()))
        if not distributed.leads():
            strategy.soup = replace(strategy.soup, rows=rows.clone(), base={module: tensor.clone() for module, tensor in base.items()})
            strategy.load_state(state)
    federation.go_on(records)


def _track(stack: ExitStack, recipe: Recipe, path: Path, engine: Engine) -> Tracking:
    return stack.enter_context(tracking(recipe, path, engine.accelerator)) if distributed.leads() else Tracking()


def _finish(
    federation: Federation,
    run: RunWriter,
    tracked: Tracking,
    on_client: Callable[[Reply], None] | None,
    on_round: Callable[[RoundRecord], None] | None,
) -> None:
    """The rounds that are left, then the final scores."""

    def keep_best(completed: int, scores: Scores) -> None:
        with profiling.spent("save"):
            distributed.first(partial(run.offer_best, completed, scores, federation.strategy))

    def save(record: RoundRecord) -> None:
        run.append(record, federation.strategy)
        tracked.record(record)
        if federation.strategy.learns_weights:
            tracked.weights(federation.strategy.weights, [client.name for client in federation.engine.clients], record.round)

    def end(final: Scores | None) -> None:
        run.finish(final)
        tracked.final(final, federation.completed)

    with profiling.spent("other"):
        for record in federation.rounds(on_client, keep_best):
            with profiling.spent("save"):
                distributed.first(partial(save, record))
            if on_round is not None:
                distributed.everyone(partial(on_round, record))
        final = federation.measure()
        if final is not None and len(final.clients) == len(federation.engine.clients):
            keep_best(federation.completed, final)
        with profiling.spent("save"):
            distributed.first(partial(end, final))

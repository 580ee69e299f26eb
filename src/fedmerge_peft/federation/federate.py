"""A whole recipe and its baselines into a run directory, from the start or on after an interruption.

Where a launcher has started several ranks, all of them do this in step (``distributed.py``); the first alone reads and
writes the directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmerge_peft import distributed
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.engines.distributed import load_engine
from fedmerge_peft.errors import RecipeError, ResumeError
from fedmerge_peft.federation.callbacks import Callback, Callbacks
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat
from fedmerge_peft.runs.checkpoint import RESUME_OVERRIDES
from fedmerge_peft.runs.cleanup import remove_temporary_files
from fedmerge_peft.runs.directory import RunDirectory, with_baselines
from fedmerge_peft.runs.record import RoundRecord, Scores
from fedmerge_peft.runs.tracking import Tracking, check_trackers, tracking
from fedmerge_peft.runs.writer import RunWriter
from fedmerge_peft.util import profiling
from fedmerge_peft.util.files import held


def run_recipe(
    recipe: Recipe, out: Path | str | None, *, engine: Engine | None, callbacks: Sequence[Callback]
) -> Path:
    """Run a recipe and its baselines; returns the run directory. Documented at ``api.federate``."""
    directory = Path(out) if out is not None else RunDirectory.default_path(recipe)
    check_trackers(recipe)
    RunDirectory.check_free(directory)
    engine = engine or load_engine(recipe)
    with ExitStack() as stack:
        distributed.on_rank_zero(partial(_hold, stack, directory))
        distributed.on_rank_zero(partial(RunDirectory.check_free, directory))
        _federate(recipe, directory, engine, Callbacks(callbacks))
    return directory


def resume_run(
    path: Path | str,
    overrides: Iterable[str],
    *,
    engine: Engine | None,
    callbacks: Sequence[Callback],
) -> Path:
    """Continue an interrupted run; returns its directory. Documented at ``api.resume``."""
    run = RunDirectory.open(path)
    recipe = _continued(run, overrides)
    check_trackers(recipe)
    if distributed.launched() > 1:
        engine = engine or load_engine(
            recipe
        )  # the ranks come together first, so that all have seen the directory before it changes
    with ExitStack() as stack:
        distributed.on_rank_zero(partial(_hold, stack, run.path))
        distributed.on_rank_zero(partial(_check_unfinished, run, recipe.rounds))
        engine = engine or load_engine(recipe)
        distributed.on_rank_zero(partial(remove_temporary_files, run.path))
        _federate(recipe, run.path, engine, Callbacks(callbacks))
    return run.path


def _hold(stack: ExitStack, directory: Path) -> None:
    stack.enter_context(held(directory))


def _check_unfinished(run: RunDirectory, rounds: int) -> None:
    if RunDirectory.open(run.path).ended and rounds == run.recipe.rounds:
        raise ResumeError(
            f"{run.path} has ended: all of its {rounds} rounds are done. For more of them: fedmerge resume {run.path} rounds=N"
        )


def _continued(run: RunDirectory, overrides: Iterable[str]) -> Recipe:
    """The run's recipe with these overrides. Raises ``RecipeError`` for those that a run cannot go on with."""
    recipe = run.recipe.replace(overrides)
    if other := [
        key for key in differing([flat(run.recipe), flat(recipe)]) if key not in RESUME_OVERRIDES
    ]:
        raise RecipeError(
            [f"{', '.join(other)}: clients would do something else than before, so this would be another run; start it with fedmerge run. "
             f"A run that goes on may change {', '.join(RESUME_OVERRIDES)}"]
        )  # fmt: skip
    for _, path in with_baselines(run.recipe, run.path):
        if (done := len(RunDirectory(path).records)) > recipe.rounds:
            raise RecipeError(
                [f"rounds: {recipe.rounds} is fewer than the {done} that {path} has done"]
            )
    return recipe


def _federate(
    recipe: Recipe,
    directory: Path,
    engine: Engine,
    callbacks: Callback,
) -> None:
    """Do what is left of a recipe and its baselines, all of it or the rest."""
    for one, path in with_baselines(recipe, directory):
        if distributed.on_rank_zero(partial(_has_ended, path, recipe.rounds)):
            continue
        federation = Federation(one, engine)
        run = distributed.on_all_ranks(partial(_open, path, one, federation))
        _catch_up(run, federation)
        with ExitStack() as stack:
            tracked = distributed.on_all_ranks(partial(_track, stack, one, path, engine))
            distributed.on_all_ranks(partial(callbacks.on_start, federation, run))
            _finish(federation, run, tracked, callbacks)
            distributed.on_all_ranks(partial(callbacks.on_end, run))


def _has_ended(path: Path, rounds: int) -> bool:
    return RunDirectory(path).final_round == rounds


def _open(path: Path, recipe: Recipe, federation: Federation) -> RunWriter:
    """What writes the run; on other ranks than the first, nothing asks it to."""
    if not distributed.is_main():
        return RunWriter(path, recipe)
    if (path / "recipe.yaml").is_file():
        return RunWriter.reopen(path, recipe, federation.engine, federation.strategy)
    return RunWriter.create(path, recipe, federation.engine)


def _catch_up(run: RunWriter, federation: Federation) -> None:
    """Go on where the run stopped; the first rank has read it."""
    strategy = federation.strategy
    records: list[dict[str, Any]] = distributed.on_rank_zero(lambda: run.records)
    if records and distributed.world_size() > 1:
        rows, base, state = distributed.on_rank_zero(
            lambda: (strategy.soup.rows, dict(strategy.soup.base), strategy.state())
        )
        if not distributed.is_main():
            strategy.soup = replace(
                strategy.soup,
                rows=rows.clone(),
                base={module: tensor.clone() for module, tensor in base.items()},
            )
            strategy.load_state(state)
    federation.restore_progress(records)


def _track(stack: ExitStack, recipe: Recipe, path: Path, engine: Engine) -> Tracking:
    return (
        stack.enter_context(tracking(recipe, path, engine.accelerator))
        if distributed.is_main()
        else Tracking()
    )


def _finish(
    federation: Federation,
    run: RunWriter,
    tracked: Tracking,
    callbacks: Callback,
) -> None:
    """The rounds that are left, then the final scores."""

    def keep_best(completed: int, scores: Scores) -> None:
        with profiling.timed("save"):
            distributed.on_rank_zero(
                partial(run.save_if_best, completed, scores, federation.strategy)
            )

    def save(record: RoundRecord) -> None:
        run.append(record, federation.strategy)
        tracked.record(record)
        if federation.strategy.learns_weights:
            tracked.weights(
                federation.strategy.weights,
                [client.name for client in federation.engine.clients],
                record.round,
            )

    def end(final: Scores | None) -> None:
        run.finish(final)
        tracked.final(final, federation.completed)

    with profiling.timed("other"):
        for record in federation.rounds(callbacks.on_client, keep_best):
            with profiling.timed("save"):
                distributed.on_rank_zero(partial(save, record))
            distributed.on_all_ranks(partial(callbacks.on_round, record))
        final = federation.evaluate()
        if final is not None and len(final.clients) == len(federation.engine.clients):
            keep_best(federation.completed, final)
        with profiling.timed("save"):
            distributed.on_rank_zero(partial(end, final))

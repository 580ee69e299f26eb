"""Run a recipe and its baselines into a run directory, or resume an interrupted run.

On several ranks, every rank calls these functions (``distributed.py``). Only rank 0 writes to the
directory, apart from the temporary files of a soup on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft import distributed
from fedmerge_peft.data.in_memory import take_data
from fedmerge_peft.data.loading import is_in_memory
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.engines.distributed import load_engine
from fedmerge_peft.errors import DataError, PluginError, RecipeError, ResumeError
from fedmerge_peft.federation import reuse
from fedmerge_peft.federation.callbacks import Callback, Callbacks
from fedmerge_peft.federation.early_stopping import EarlyStopping
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.federation.privacy_ledger import PrivacyLedger
from fedmerge_peft.federation.tuning import Decisions
from fedmerge_peft.plugins import CALLBACKS
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.callbacks import CallbackRecipe
from fedmerge_peft.recipe.diff import differing, flat
from fedmerge_peft.recipe.python_values import check_recipe
from fedmerge_peft.runs.checkpoint import RESUME_OVERRIDES
from fedmerge_peft.runs.cleanup import remove_temporary_files
from fedmerge_peft.runs.directory import RunDirectory, with_baselines
from fedmerge_peft.runs.passed_model import check_model, with_model
from fedmerge_peft.runs.record import Scores
from fedmerge_peft.runs.tracking import Tracking, check_trackers, tracking
from fedmerge_peft.runs.writer import RunWriter
from fedmerge_peft.tasks.in_memory import is_passed
from fedmerge_peft.util.files import locked_directory
from fedmerge_peft.util.profiling import timed

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.data.in_memory import Data
    from fedmerge_peft.tasks.base import ComputeMetrics
    from fedmerge_peft.tasks.in_memory import PassedModel

log = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    out: Path | str | None,
    *,
    data: Data | None = None,
    model: PassedModel | None = None,
    metrics: ComputeMetrics | None = None,
    engine: Engine | None,
    callbacks: Sequence[Callback],
) -> Path:
    """Run a recipe and its baselines; return the run directory. Documented at ``api.federate``."""
    check_recipe(recipe)
    recipe, splits = with_data(with_model(recipe, model, engine), data, engine)
    directory = Path(out) if out is not None else RunDirectory.default_path(recipe)
    check_trackers(recipe)
    RunDirectory.check_free(directory)
    reuse.reusable(recipe, directory)
    engine = _loaded(recipe, splits, engine, metrics)
    with ExitStack() as stack:
        distributed.on_rank_zero(partial(_lock, stack, directory))
        distributed.on_rank_zero(partial(RunDirectory.check_free, directory))
        _federate(recipe, directory, engine, callbacks)
    return directory


def resume_run(
    run: RunDirectory,
    overrides: Iterable[str],
    *,
    data: Data | None = None,
    model: PassedModel | None = None,
    metrics: ComputeMetrics | None = None,
    engine: Engine | None,
    callbacks: Sequence[Callback],
) -> Path:
    """Resume an interrupted run; return its directory. Documented at ``api.resume``."""
    saved = run.trusted_recipe if engine is None else run.recipe
    recipe = _resumed_recipe(run, saved, overrides)
    splits = _same_data(run, recipe, data, engine)
    check_model(run, with_model(recipe, model, engine), needed=engine is None)
    check_trackers(recipe)
    if distributed.launched_processes() > 1 and engine is None:
        # Loading synchronizes the ranks, so all of them have read the directory before it changes.
        engine, metrics = _loaded(recipe, splits, engine, metrics), None
    with ExitStack() as stack:
        distributed.on_rank_zero(partial(_lock, stack, run.path))
        distributed.on_rank_zero(partial(_check_unfinished, run, recipe))
        engine = _loaded(recipe, splits, engine, metrics)
        distributed.on_rank_zero(partial(remove_temporary_files, run.path))
        _federate(recipe, run.path, engine, callbacks)
    return run.path


def _loaded(
    recipe: Recipe,
    splits: Mapping[str, Dataset] | None,
    engine: Engine | None,
    metrics: ComputeMetrics | None,
) -> Engine:
    """Return the given engine, or load one that also evaluates the given metrics.

    Raises:
        RecipeError: Both an engine and metrics are given.
    """
    if engine is not None:
        if metrics is not None:
            raise RecipeError(
                "metrics: pass either metrics or engine; a loaded engine gets metrics from "
                "engine.add_metrics(function)"
            )
        return engine
    loaded = load_engine(recipe, splits)
    if metrics is not None:
        loaded.add_metrics(metrics)
    return loaded


def with_data(
    recipe: Recipe, data: Data | None, engine: Engine | None = None
) -> tuple[Recipe, dict[str, Dataset] | None]:
    """Return the recipe with ``data`` as its examples, and these examples by split.

    If ``data`` is None, the recipe is unchanged and the splits are None.

    Raises:
        DataError: The examples cannot be used (``take_data``), or the engine has its own examples.
    """
    if data is None:
        return recipe, None
    if engine is not None:
        raise DataError("data: the engine has its own examples; pass either data or engine")
    section, splits = take_data(recipe.data, data, recipe.task.label_column)
    return recipe.model_copy(update={"data": section}), splits


def _same_data(
    run: RunDirectory, recipe: Recipe, data: Data | None, engine: Engine | None
) -> dict[str, Dataset] | None:
    """Return the passed examples by split; None if ``data`` is None.

    Raises:
        ResumeError: The run's examples were in memory and are missing or changed, or examples are
            passed to a run that reads them from ``data.path``.
        DataError: Both ``data`` and ``engine`` are passed, or the examples cannot be used.
    """
    in_memory = is_in_memory(recipe.data.path)
    if data is None and engine is None and in_memory:
        raise ResumeError(
            f"{run.path} cannot be resumed without its examples, which a Python program passed and "
            f"the run does not store; in Python, pass them again: resume({str(run.path)!r}, "
            "data=...)"
        )
    if data is not None and not in_memory:
        raise ResumeError(
            f"{run.path} reads its examples from data.path: {recipe.data.path}; resume it without "
            "data"
        )
    given, splits = with_data(recipe, data, engine)
    if given.data != recipe.data:
        raise ResumeError(
            f"{run.path} cannot be resumed with other examples: its examples have the fingerprint "
            f"{recipe.data.path}, those passed now have {given.data.path}; pass the same data"
        )
    return splits


def _lock(stack: ExitStack, directory: Path) -> None:
    stack.enter_context(locked_directory(directory))


def _check_unfinished(run: RunDirectory, recipe: Recipe) -> None:
    """Raise ``ResumeError`` if the run and all of its baselines have ended under this recipe."""
    if not all(_has_ended(path, one) for one, path in with_baselines(recipe, run.path)):
        return
    stopped = run.summary.get("stopped")
    more = " stop.patience=null" if recipe.stop.patience is not None else ""
    done = f"all of its {recipe.rounds} rounds are done"
    if recipe.rounds == 1:
        done = "its only round is done"
    advice = f"rounds=N{more}"
    if stopped:
        done = f"{stopped['reason']}, after {run.summary['rounds']} of {recipe.rounds} rounds"
        advice = f"rounds=N, where N is not {recipe.rounds}"
        if more:
            advice = f"stop.patience=null, and rounds=N for more than {recipe.rounds}"
    command = f"fedmerge resume {run.path} {advice}"
    if is_in_memory(recipe.data.path) or is_passed(recipe.backbone.model):
        command = f"in Python, resume it again with {advice}"
    raise ResumeError(f"{run.path} has ended: {done}. For more rounds: {command}")


def _resumed_recipe(run: RunDirectory, saved: Recipe, overrides: Iterable[str]) -> Recipe:
    """Return the run's recipe with the overrides.

    Raises:
        RecipeError: An override changes a key that is not in ``RESUME_OVERRIDES``, or the number of
            rounds is less than the number of completed rounds of the run or of a baseline.
    """
    recipe = saved.replace(overrides)
    changed = differing([flat(saved), flat(recipe)])
    if refused := [key for key in changed if key not in RESUME_OVERRIDES]:
        raise RecipeError(
            f"{', '.join(refused)}: cannot be changed in a resumed run; start a new run with "
            f"fedmerge run, or change only {', '.join(RESUME_OVERRIDES)}"
        )
    for _, path in with_baselines(saved, run.path):
        done = RunDirectory(path).rounds_on_disk
        if done > recipe.rounds:
            raise RecipeError(
                f"rounds: {recipe.rounds} is less than the {done} completed rounds of {path}; "
                f"set rounds to {done} or more, or start a new run"
            )
    return recipe


def _federate(recipe: Recipe, directory: Path, engine: Engine, given: Sequence[Callback]) -> None:
    """Run the unfinished part of a recipe's own run and of its baselines."""
    own = [_callback(section) for section in recipe.callbacks]
    callbacks = Callbacks([*own, *given])
    reused = distributed.on_rank_zero(partial(_reused, recipe, directory, engine))
    decisions = distributed.on_rank_zero(partial(_decisions, directory, reused))
    ledger = PrivacyLedger(
        recipe, len(engine.clients), simulated=engine.simulated, directory=directory
    )
    parts = with_baselines(recipe, directory)
    begins = not distributed.on_rank_zero(lambda: RunDirectory(directory).rounds_on_disk)
    for one, path in parts:
        if path != directory and one.strategy.name in reused:
            distributed.on_rank_zero(partial(reuse.copy_run, reused[one.strategy.name], path))
        if distributed.on_rank_zero(partial(_has_ended, path, one)):
            continue
        federation = Federation(one, engine, decisions, ledger, directory)
        for baseline, _ in parts[1:] if begins and path == directory else ():
            if baseline.strategy.name not in reused:
                place = f"baselines[{recipe.baselines.index(baseline.strategy)}]"
                _check_baseline(place, baseline, engine, ledger, directory)
        run = RunWriter(path, one)
        run.begin(engine, federation.strategy)
        stopping = EarlyStopping(one.stop)
        _restore(federation, run, stopping)
        decisions = federation.decide()  # the baselines use the same values
        run.write_decisions(decisions.document)
        with ExitStack() as stack:
            trackers = tracking(one, path, engine.accelerator)
            tracked = distributed.on_all_ranks(partial(stack.enter_context, trackers))
            callbacks.on_start(federation, run)
            _run_rounds(federation, run, tracked, callbacks, stopping)
            callbacks.on_end(run)
        if federation.private and path != directory and recipe.strategy.federated:
            RunWriter(directory, recipe).update_privacy(ledger.document())


def _check_baseline(
    place: str, recipe: Recipe, engine: Engine, ledger: PrivacyLedger, directory: Path
) -> None:
    """Construct a baseline's federation before the run, so that its errors lose no rounds.

    Args:
        place: Place of the baseline in the recipe, for error messages.
        recipe: Recipe of the baseline.
        engine: Engine of the run.
        ledger: Ledger of the run.
        directory: Directory of the run.

    Raises:
        RecipeError: The baseline cannot start; for example, its strategy does not support the
            adapter, the data or a section of the recipe.
    """
    try:
        Federation(recipe, engine, None, ledger, directory)
    except RecipeError as error:
        raise RecipeError(
            *(
                place + fault.removeprefix("strategy")
                if fault.startswith(("strategy.", "strategy:"))
                else f"the baseline {recipe.strategy.name}: {fault}"
                for fault in error.faults
            )
        ) from error


def _callback(section: CallbackRecipe) -> Callback:
    """Construct one of the recipe's callbacks; raise ``PluginError`` if it is no ``Callback``."""
    entry = CALLBACKS[section.name]
    callback = entry.load()(section)
    if not isinstance(callback, Callback):
        raise PluginError(
            f"the callback {section.name!r} of {entry.module} has the type "
            f"{type(callback).__name__}; register a subclass of fedmerge_peft.Callback"
        )
    return callback


def _reused(recipe: Recipe, directory: Path, engine: Engine) -> dict[str, RunDirectory]:
    """Return the earlier runs to reuse as baselines, by strategy.

    Raises:
        RecipeError: A run cannot be reused (``reuse.reusable``, ``reuse.check_data``).
    """
    baselines = reuse.reusable(recipe, directory)
    reuse.check_data(recipe, engine, baselines)
    return baselines


def _decisions(directory: Path, reused: Mapping[str, RunDirectory]) -> Decisions | None:
    """Return the values chosen in the run or in the runs that it reuses; None if there are none."""
    document = RunDirectory(directory).decisions or reuse.earlier_decisions(reused)
    return Decisions(document) if document else None


def _has_ended(path: Path, recipe: Recipe) -> bool:
    """Return True if a run has ended, and the recipe does not extend it.

    A recipe extends the run if its ``rounds`` differ from the rounds that were planned, or if the
    run stopped early and the recipe's section ``stop`` differs.
    """
    run = RunDirectory(path)
    if run.ended_for != recipe.rounds:
        return False
    return not (run.summary.get("stopped") and run.recipe.stop != recipe.stop)


def _restore(federation: Federation, run: RunWriter, stopping: EarlyStopping) -> None:
    """Restore all ranks to the state that rank 0 has read from the run directory."""
    strategy = federation.strategy
    records: list[dict[str, Any]] = distributed.on_rank_zero(lambda: run.records)
    if records and distributed.world_size() > 1:
        rows, base, state = distributed.on_rank_zero(
            lambda: (strategy.soup.rows, dict(strategy.soup.base), strategy.state_dict())
        )
        if not distributed.is_main():
            base = {module: tensor.clone() for module, tensor in base.items()}
            strategy.soup = replace(strategy.soup.with_rows(rows, len(rows)), base=base)
            strategy.load_state_dict(state)
    federation.restore_progress(records)
    for record in records:
        stopping.observe((record["served"] or {}).get("clients"))


def _run_rounds(
    federation: Federation,
    run: RunWriter,
    tracked: Tracking,
    callbacks: Callbacks,
    stopping: EarlyStopping,
) -> None:
    """Run the remaining rounds or stop early; then compute the final scores."""
    strategy = federation.strategy
    names = [client.name for client in federation.engine.clients]

    def save_if_best(completed: int, scores: Scores) -> None:
        with timed("save"):
            run.save_if_best(completed, scores, strategy)

    with timed("other"):
        # In a private run, the choice of the best round would depend on scores without noise.
        on_scores = None if federation.private else save_if_best
        reason = stopping.reason
        rounds = federation.rounds(callbacks.on_client, on_scores)
        while reason is None and (record := next(rounds, None)) is not None:
            with timed("save"):
                run.append(record, strategy)
                tracked.record(record)
                if strategy.learns_weights:
                    tracked.weights(strategy.weights, names, record.round)
            callbacks.on_round(record)
            stopping.observe(record.served.clients if record.served is not None else None)
            requested = "a callback has stopped the run" if callbacks.any_stopped() else None
            reason = stopping.reason or requested
        if federation.completed == federation.recipe.rounds:
            reason = None
        if reason is not None:
            log.info("stopped after round %d: %s", federation.completed, reason)
        final = federation.evaluate()
        if final is not None and len(final.clients) == len(names) and on_scores is not None:
            on_scores(federation.completed, final)
        confusion = None if final is None else federation.confusion(final.clients)
        with timed("save"):
            run.write_confusion(confusion)
            privacy = federation.ledger.document() if federation.private else None
            served = run.finish(final, privacy, reason)
            tracked.final(served, federation.completed)

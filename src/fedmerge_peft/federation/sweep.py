"""Many recipes, one after another, into run directories side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from time import sleep

from fedmerge_peft import distributed
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import FedMergeError, RecipeError, ResumeError, RunBusyError, RunError, SweepError
from fedmerge_peft.federation.federate import federate, resume
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat, written
from fedmerge_peft.recipe.grid import expand
from fedmerge_peft.runs.directory import Run
from fedmerge_peft.runs.record import RoundRecord
from fedmerge_peft.util.files import held, writing

log = logging.getLogger(__name__)

__all__ = ["expand", "sweep"]

_MOST_DIFFERENCES = 8
_POLL = 5.0
"""Seconds between two looks at runs that other processes are busy with."""


def sweep(
    recipes: Mapping[str, Recipe],
    out: Path | str,
    *,
    on_run: Callable[[str, Run, bool], None] | None = None,
    on_failure: Callable[[str, FedMergeError], None] | None = None,
    on_round: Callable[[str, RoundRecord], None] | None = None,
) -> dict[str, Run]:
    """Run each recipe into ``out/<name>``, so that the same call again only does what is left.

    A recipe whose run is finished is not run again, one whose run was interrupted is resumed. Data and model are loaded once for all
    recipes that agree on them (``LocalEngine.lend``); these run one after another, whatever their order in ``recipes``.

    Several processes may share a sweep: each does what no other is at, then waits for the others' runs, and goes on with what they
    leave undone.

    Args:
        recipes: What to run, by the names of the run directories; ``expand`` makes such a mapping.
        out: The folder of the run directories; made where it is missing.
        on_run: Called with the name, the run, and whether it was run just now and here; those that had been before come first.
        on_failure: Called with the name and the error of a recipe that failed. The others run all the same.
        on_round: Called with the name and the record after each round, those of baselines too.

    Returns:
        The finished runs, in the order of ``recipes``.

    Raises:
        RecipeError: A name that is no folder's name; nothing was started.
        DeviceError: A launcher has started several ranks of this process.
        RunError: A directory holds the run of another recipe, or files that no run writes; nothing was started.
        SweepError: Some recipes failed; raised after all the others have run.
    """
    distributed.refuse("a sweep")
    paths = {name: _path(Path(out), name) for name in recipes}
    with writing(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    finished: dict[str, Run] = {}
    failures: dict[str, str] = {}

    def end(name: str, run: Run, fresh: bool) -> None:
        finished[name] = run
        if on_run is not None:
            on_run(name, run, fresh)

    def attempt(name: str, engine: LocalEngine | None) -> LocalEngine | None:
        """Run one recipe, on this engine or a new one; the engine to go on with. Raises ``RunBusyError``."""
        try:
            with held(paths[name]):
                if run := _finished(paths[name], recipes[name]):  # by another process, since this one looked
                    end(name, run, fresh=False)
                    return engine
                engine = engine or LocalEngine.from_recipe(recipes[name])
                report = None if on_round is None else lambda record: on_round(name, record)
                end(name, _run(recipes[name], paths[name], engine, report), fresh=True)
        except RunBusyError:
            raise
        except FedMergeError as error:
            failures[name] = str(error)
            if on_failure is not None:
                on_failure(name, error)
        return engine

    before = {name: _finished(paths[name], recipe) for name, recipe in recipes.items()}
    for name, run in before.items():
        if run is not None:
            end(name, run, fresh=False)
    waiting = {name: recipe for name, recipe in recipes.items() if before[name] is None}
    said = False
    while waiting:
        engine: LocalEngine | None = None
        left = len(waiting)
        for name, recipe in list(waiting.items()):
            lent = engine.lend(recipe) if engine is not None else None
            if engine is None or lent is not None:
                try:
                    engine = attempt(name, lent)
                except RunBusyError:
                    continue
                del waiting[name]
        if len(waiting) == left:
            if not said:
                log.warning("waiting for other processes, which are running %s", ", ".join(waiting))
            said = True
            sleep(_POLL)
    if failures:
        raise SweepError(failures)
    return {name: finished[name] for name in recipes}


def _run(recipe: Recipe, path: Path, engine: LocalEngine, on_round: Callable[[RoundRecord], None] | None) -> Run:
    """Go on from what an interruption has left; from the start, where that is too little."""
    try:
        if Run(path).records:
            return resume(path, engine=engine, on_round=on_round)
    except ResumeError as error:
        log.warning("begun anew: %s", error)
    Run(path).clear()
    return federate(recipe, path, engine=engine, on_round=on_round)


def _path(out: Path, name: str) -> Path:
    if name in ("", "..") or Path(name).name != name:
        raise RecipeError([f"{name!r} is no name for a folder, and a sweep's recipes are run in {out}/NAME; give it another"])
    return out / name


def _finished(path: Path, recipe: Recipe) -> Run | None:
    """The recipe's run, if it has ended; None where there is none yet, or an unfinished one.

    Raises ``RunError`` where the directory holds anything else.
    """
    if not (path / "recipe.yaml").is_file():
        if path.is_file() or any(not found.name.startswith(".recipe.yaml.") for found in Run(path).files()):
            raise RunError(f"{path} holds files that are no run, and nothing is ever overwritten. Move them, or choose another --out")
        return None
    run = Run.open(path)
    there, here = (flat(each.model_copy(update={"name": recipe.name})) for each in (run.recipe, recipe))
    if keys := differing([there, here]):
        said = [f"{key} is {written(there.get(key))} there and {written(here.get(key))} here" for key in keys[:_MOST_DIFFERENCES]]
        more = ["..."] if len(keys) > _MOST_DIFFERENCES else []
        raise RunError(f"{path} holds the run of another recipe: {'; '.join(said + more)}. Choose another --out, or move it away")
    if run.ended:
        return run
    run.check_ours()
    return None

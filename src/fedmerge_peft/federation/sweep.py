"""Many recipes, one after another, into run directories side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import sleep

from fedmerge_peft import distributed
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import (
    FedMergeError,
    RecipeError,
    ResumeError,
    RunBusyError,
    RunError,
    SweepError,
)
from fedmerge_peft.federation.callbacks import Callback
from fedmerge_peft.federation.federate import resume_run, run_recipe
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat, written
from fedmerge_peft.runs.cleanup import check_only_run_files, files_in, remove_run
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.runs.record import RoundRecord
from fedmerge_peft.util.files import locked_directory, translated_write_errors

log = logging.getLogger(__name__)

_MOST_DIFFERENCES = 8
_POLL = 5.0
"""Seconds between two looks at runs that other processes are busy with."""


def run_sweep(
    recipes: Mapping[str, Recipe],
    out: Path | str,
    on_run: Callable[[str, Path, bool], None] | None = None,
    on_failure: Callable[[str, FedMergeError], None] | None = None,
    on_round: Callable[[str, RoundRecord], None] | None = None,
) -> dict[str, Path]:
    """Run each recipe into ``out/<name>``; returns the run directories. Documented at ``api.sweep``."""
    distributed.require_single_process("a sweep")
    paths = {name: _path(Path(out), name) for name in recipes}
    with translated_write_errors(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    finished: dict[str, Path] = {}
    failures: dict[str, str] = {}

    def end(name: str, fresh: bool) -> None:
        finished[name] = paths[name]
        if on_run is not None:
            on_run(name, paths[name], fresh)

    def attempt(name: str, engine: LocalEngine | None) -> LocalEngine | None:
        """Run one recipe, on this engine or a new one; the engine to go on with. Raises ``RunBusyError``."""
        try:
            with locked_directory(paths[name]):
                if _finished(
                    paths[name], recipes[name]
                ):  # by another process, since this one looked
                    end(name, fresh=False)
                    return engine
                engine = engine or LocalEngine.from_recipe(recipes[name])
                callbacks = [] if on_round is None else [Callback(on_round=partial(on_round, name))]
                _run(recipes[name], paths[name], engine, callbacks)
                end(name, fresh=True)
        except RunBusyError:
            raise
        except FedMergeError as error:
            failures[name] = str(error)
            if on_failure is not None:
                on_failure(name, error)
        return engine

    before = {name: _finished(paths[name], recipe) for name, recipe in recipes.items()}
    for name in recipes:
        if before[name]:
            end(name, fresh=False)
    waiting = {name: recipe for name, recipe in recipes.items() if not before[name]}
    said = False
    while waiting:
        engine: LocalEngine | None = None
        left = len(waiting)
        for name, recipe in list(waiting.items()):
            lent = engine.with_recipe(recipe) if engine is not None else None
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


def _run(recipe: Recipe, path: Path, engine: LocalEngine, callbacks: Sequence[Callback]) -> None:
    """Go on from what an interruption has left; from the start, where that is too little."""
    try:
        if RunDirectory(path).records:
            resume_run(path, (), engine=engine, callbacks=callbacks)
            return
    except ResumeError as error:
        log.warning("begun anew: %s", error)
    remove_run(path)
    run_recipe(recipe, path, engine=engine, callbacks=callbacks)


def _path(out: Path, name: str) -> Path:
    if name in ("", "..") or Path(name).name != name:
        raise RecipeError(
            [
                f"{name!r} is no name for a folder, and a sweep's recipes are run in {out}/NAME; give it another"
            ]
        )
    return out / name


def _finished(path: Path, recipe: Recipe) -> bool:
    """Whether the recipe's run has ended; False where there is none yet, or an unfinished one.

    Raises ``RunError`` where the directory holds anything else.
    """
    if not (path / "recipe.yaml").is_file():
        if path.is_file() or any(
            not found.name.startswith(".recipe.yaml.") for found in files_in(path)
        ):
            raise RunError(
                f"{path} holds files that are no run, and nothing is ever overwritten. Move them, or choose another --out"
            )
        return False
    run = RunDirectory.open(path)
    there, here = (
        flat(each.model_copy(update={"name": recipe.name})) for each in (run.recipe, recipe)
    )
    if keys := differing([there, here]):
        said = [
            f"{key} is {written(there.get(key))} there and {written(here.get(key))} here"
            for key in keys[:_MOST_DIFFERENCES]
        ]
        more = ["..."] if len(keys) > _MOST_DIFFERENCES else []
        raise RunError(
            f"{path} holds the run of another recipe: {'; '.join(said + more)}. Choose another --out, or move it away"
        )
    if run.ended:
        return True
    check_only_run_files(run.path)
    return False

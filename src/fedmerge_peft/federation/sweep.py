"""Run many recipes, one after another, into sibling run directories."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

from fedmerge_peft import distributed
from fedmerge_peft.data.columns import join_values
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
from fedmerge_peft.federation.federate import resume_run, run_recipe, with_data
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat, written
from fedmerge_peft.runs.cleanup import check_only_run_files, files_in, remove_run
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.runs.passed_model import with_model
from fedmerge_peft.util.files import locked_directory, translated_write_errors

if TYPE_CHECKING:
    from fedmerge_peft.data.in_memory import Data
    from fedmerge_peft.tasks.in_memory import PassedModel

log = logging.getLogger(__name__)

_MOST_DIFFERENCES = 8
"""Maximum number of keys or runs that a message lists."""
_POLL_SECONDS = 5.0
"""Seconds between checks of runs that other processes are writing."""


def run_sweep(
    recipes: Mapping[str, Recipe],
    out: Path | str,
    on_run: Callable[[str, Path, bool], None] | None = None,
    on_failure: Callable[[str, FedMergeError], None] | None = None,
    callbacks: Callable[[str], Sequence[Callback]] = lambda name: (),
    data: Data | None = None,
    model: PassedModel | None = None,
) -> dict[str, Path]:
    """Run each recipe into ``out/<name>``; return the directories. Documented at ``api.sweep``.

    Before a run starts, ``callbacks(name)`` is called and returns its callbacks.
    """
    distributed.require_single_process("a sweep")
    paths = {name: _run_path(Path(out), name) for name in recipes}
    examples = {
        name: with_data(with_model(recipe, model), data) for name, recipe in recipes.items()
    }
    recipes = {name: recipe for name, (recipe, _) in examples.items()}
    with translated_write_errors(Path(out)):
        Path(out).mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}

    def report(name: str, fresh: bool) -> None:
        if on_run is not None:
            on_run(name, paths[name], fresh)

    def attempt(name: str, engine: LocalEngine | None) -> LocalEngine | None:
        """Run one recipe; return the engine for the next. Raises ``RunBusyError``."""
        try:
            with locked_directory(paths[name]):
                if _has_finished(
                    paths[name], recipes[name]
                ):  # another process has run it meanwhile
                    report(name, fresh=False)
                    return engine
                engine = engine or LocalEngine.from_recipe(*examples[name])
                run_or_resume(recipes[name], paths[name], engine, callbacks(name))
                report(name, fresh=True)
        except RunBusyError:
            raise
        except FedMergeError as error:
            failures[name] = str(error)
            if on_failure is not None:
                on_failure(name, error)
        return engine

    finished = {name: _has_finished(paths[name], recipe) for name, recipe in recipes.items()}
    for name in recipes:
        if finished[name]:
            report(name, fresh=False)
    waiting = {name: recipe for name, recipe in recipes.items() if not finished[name]}
    warned = False
    while waiting:
        engine: LocalEngine | None = None
        before = len(waiting)
        for name, recipe in list(waiting.items()):
            reused = engine.with_recipe(recipe) if engine is not None else None
            if engine is None or reused is not None:
                try:
                    engine = attempt(name, reused)
                except RunBusyError:
                    continue
                del waiting[name]
        if len(waiting) == before:
            if not warned:
                names = join_values(waiting, _MOST_DIFFERENCES)
                log.warning("waiting for other processes, which are running %s", names)
            warned = True
            sleep(_POLL_SECONDS)
    if failures:
        raise SweepError(failures)
    return paths


def run_or_resume(
    recipe: Recipe, path: Path, engine: LocalEngine, callbacks: Sequence[Callback]
) -> None:
    """Resume a run that has completed rounds; otherwise remove its files and start it.

    A run that has completed rounds but cannot be resumed is also removed and started again.
    """
    try:
        run = RunDirectory(path)
        if run.rounds_on_disk:
            resume_run(run, (), engine=engine, callbacks=callbacks)
            return
    except ResumeError as error:
        reason = str(error).partition(". ")[0].partition("; ")[0]  # without advice to keep the run
        log.warning("%s; this unfinished run is removed and started again", reason)
    remove_run(path)
    run_recipe(recipe, path, engine=engine, callbacks=callbacks)


def _run_path(out: Path, name: str) -> Path:
    if name in ("", "..") or Path(name).name != name:
        raise RecipeError(
            f"{name!r} is not a valid folder name, but the recipes of a sweep run in "
            f"{out}/NAME; choose another name"
        )
    return out / name


def _has_finished(path: Path, recipe: Recipe) -> bool:
    """Return True if the recipe's run has ended; False if it is unfinished or absent.

    Raises:
        RunError: The path is a file, or a directory with the run of another recipe or with files
            that do not belong to a run.
    """
    if not (path / "recipe.yaml").is_file():
        names = [file.name for file in files_in(path)] if path.is_dir() else []
        if path.is_file() or any(not name.startswith(".recipe.yaml.") for name in names):
            content, them = "contains files that do not belong to a run", "them"
            if path.is_file():
                content, them = "is a file, not a run directory", "it"
            raise RunError(
                f"{path} {content}; existing files are never overwritten. Move {them}, or choose "
                "another output folder (--out)"
            )
        return False
    run = RunDirectory.open(path)
    old, new = (
        flat(other.model_copy(update={"name": recipe.name})) for other in (run.recipe, recipe)
    )
    if keys := differing([old, new]):
        differences = [
            f"{key} is {written(old.get(key))} there and {written(new.get(key))} here"
            for key in keys[:_MOST_DIFFERENCES]
        ]
        if len(keys) > _MOST_DIFFERENCES:
            differences.append(f"and {len(keys) - _MOST_DIFFERENCES} more")
        raise RunError(
            f"{path} contains the run of another recipe: {'; '.join(differences)}. "
            "Move this run away, or choose another output folder (--out)"
        )
    if run.ended:
        return True
    check_only_run_files(path)
    return False

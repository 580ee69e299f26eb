"""Reuse the baselines of an earlier run instead of running them again (``baselines_from``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.errors import RecipeError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat, written
from fedmerge_peft.runs import documents
from fedmerge_peft.runs.directory import RunDirectory, with_baselines
from fedmerge_peft.runs.writer import metadata
from fedmerge_peft.util import strict_json
from fedmerge_peft.util.files import hardlink, translated_write_errors

if TYPE_CHECKING:
    from fedmerge_peft.engines.base import Engine

log = logging.getLogger(__name__)

_IRRELEVANT = (
    "name",
    "baselines",
    "baselines_from",
    "tracking",
    "evaluation.batch_size",
    "training.device",
    "training.prefix_cache",
    "training.prefix_disk",
    "training.packing",
    "training.clients_per_batch",
)
"""Keys that do not change a baseline's results, except for rounding."""
_MOST_DIFFERENCES = 8
"""Maximum number of keys that an error lists."""


def reusable(recipe: Recipe, directory: Path) -> dict[str, RunDirectory]:
    """Return the runs in ``baselines_from`` that replace baselines missing in the directory.

    The keys are names of strategies. The earlier run's own strategy counts as a baseline too.

    Raises:
        RecipeError: ``baselines_from`` is not a run, has not ended, has none of the missing
            baselines, or has a recipe that would not give the same baselines.
    """
    missing = {
        part.strategy.name: part
        for part, path in with_baselines(recipe, directory)
        if path != directory and not (path / "recipe.yaml").is_file()
    }
    if recipe.baselines_from is None or not missing:
        return {}
    try:
        run = RunDirectory.open(recipe.baselines_from)
        earlier = {run.recipe.strategy.name: run, **run.baselines}
    except RunError as error:
        raise RecipeError(f"baselines_from: {error}") from error
    reused = {}
    for name, part in missing.items():
        if name in earlier:
            _check(part, earlier[name], run)
            reused[name] = earlier[name]
        else:
            log.info("%s has no run of %s to reuse, so this baseline runs now", run.path, name)
    if not reused:
        raise RecipeError(
            f"baselines_from: {run.path} has no {' or '.join(missing)}; it has "
            f"{', '.join(earlier)}. Name another run, or remove baselines_from"
        )
    return reused


def _check(recipe: Recipe, earlier: RunDirectory, run: RunDirectory) -> None:
    """Raise ``RecipeError`` unless the earlier run has ended under the same recipe.

    Keys in ``_IRRELEVANT`` may differ. ``run`` is the run in ``baselines_from``.
    """
    name = recipe.strategy.name
    if earlier.ended_for is None:
        raise RecipeError(
            f"baselines_from: the run of {name} in {run.path} has not ended; first resume "
            f"{run.path}"
        )
    flat_own, flat_earlier = (
        {
            key: value
            for key, value in flat(version).items()
            if not f"{key}.".startswith(tuple(f"{name}." for name in _IRRELEVANT))
        }
        for version in (recipe, earlier.recipe)
    )
    if keys := differing([flat_earlier, flat_own]):
        changes = [
            f"{_in_baseline(key, name)} was {written(flat_earlier.get(key))}, "
            f"is {written(flat_own.get(key))}"
            for key in keys[:_MOST_DIFFERENCES]
        ]
        if len(keys) > _MOST_DIFFERENCES:
            changes.append(f"and {len(keys) - _MOST_DIFFERENCES} more")
        raise RecipeError(
            f"baselines_from: {earlier.path} is not a baseline of this recipe: "
            f"{'; '.join(changes)}. Run the baselines again (remove baselines_from), or restore "
            "these values"
        )


def _in_baseline(key: str, name: str) -> str:
    """Name a key of a baseline's recipe as it appears in the recipe that has the baseline."""
    section, _, field = key.partition(".")
    return f"{field} of the baseline {name}" if section == "strategy" else key


def earlier_decisions(reused: Mapping[str, RunDirectory]) -> dict[str, dict[str, Any]]:
    """Return the earlier runs' entries of ``decisions.json``: learning rate and epochs, if chosen.

    Raises:
        RecipeError: The earlier runs have chosen different values.
    """
    chosen = {run.path: run.decisions for run in reused.values()}
    first, *others = chosen.values() or [{}]
    values = {key: entry["value"] for key, entry in first.items()}
    for other in others:
        if {key: entry["value"] for key, entry in other.items()} != values:
            paths = " and ".join(map(str, chosen))
            raise RecipeError(
                f"baselines_from: {paths} have chosen different learning rates or epochs. Run the "
                "baselines again (remove baselines_from)"
            )
    return first


def check_data(recipe: Recipe, engine: Engine, reused: dict[str, RunDirectory]) -> None:
    """Raise ``RecipeError`` if clients, examples or adapters differ from those of the earlier runs.

    Also raised if the engine has no digest of its examples to compare.
    """
    own = metadata(recipe, engine) if reused else {}
    if reused and "examples.json" not in own:
        raise RecipeError(
            "baselines_from: the examples cannot be compared with those of the earlier run, "
            "because the engine does not hold them, as across sites; remove baselines_from"
        )
    for run in reused.values():
        for name, document in own.items():
            path = run.path / name
            saved = documents.read(path) if path.is_file() else None
            if saved != strict_json.loads(strict_json.dumps(document)):
                problem = "is missing, so data and model cannot be compared with the earlier run's"
                if saved is not None:
                    problem = "differs from this run's, as after a change of the data or the model"
                raise RecipeError(
                    f"baselines_from: {path} {problem}; run the baselines again (remove "
                    "baselines_from)"
                )


def copy_run(run: RunDirectory, path: Path) -> None:
    """Copy a run to ``path``, as hard links where possible.

    The run's own baselines and tracking files are left out. The recipe is copied last, because it
    marks a run directory. Raises ``RunError`` if a file cannot be written.
    """
    with translated_write_errors(path):
        files = sorted(
            (file for file in run.path.rglob("*") if file.is_file()),
            key=lambda file: file == run.path / "recipe.yaml",
        )
        for file in files:
            part = file.relative_to(run.path)
            if part.parts[0] not in ("baselines", "tracking"):
                (path / part).parent.mkdir(parents=True, exist_ok=True)
                hardlink(file, path / part)
    log.info("reusing %s of %s", run.recipe.strategy.name, run.path)

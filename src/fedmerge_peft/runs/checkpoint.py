"""Checkpoints: the state from which a run resumes. Each round writes one; two are kept.

checkpoint/round-00007.soup.safetensors   the soup; until the run ends, soup.safetensors is a hard
                                          link to the latest
checkpoint/round-00007.safetensors        the strategy's state and a manifest: counters, the length
                                          of metrics.jsonl, the recipe, the SHA-256 sums of the soup
                                          and of the last line of metrics.jsonl

The second file is written last, after all other files of the round including the metrics. A round
is complete if this file exists. Reading verifies both files; if one is damaged, the previous
checkpoint is used. No random generator state is stored, because every draw derives from the seed
and the round (``util/seeds.py``) or, if it must be secret, comes from the operating system. Nothing
is pickled.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import ResumeError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import flat, written
from fedmerge_peft.runs.documents import check
from fedmerge_peft.strategies.base import Strategy
from fedmerge_peft.strategies.saved_state import SavedState
from fedmerge_peft.util import checked, strict_json
from fedmerge_peft.util.files import translated_write_errors
from fedmerge_peft.util.ranges import Text, Whole

log = logging.getLogger(__name__)

RESUME_OVERRIDES = (
    "name",
    "rounds",
    "evaluation.every",
    "stop.patience",
    "stop.metric",
    "tracking",
    "callbacks",
    "plugins",
)
"""Recipe keys that may change on resume, as they do not affect the clients' computations."""
KEEP_LAST = 2
"""Number of the latest checkpoints that are kept."""
_NAME = re.compile(r"round-(\d{5,})(\.soup)?\.safetensors")


@dataclass(frozen=True)
class Manifest:
    """Metadata of a checkpoint, stored with its tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    round: Whole
    """Number of completed rounds."""
    metrics_bytes: Whole
    """Length of ``metrics.jsonl`` after this round, bytes."""
    metrics_sha256: Text
    """SHA-256 sum of the last line of ``metrics.jsonl`` after this round."""
    soup_sha256: Text
    """SHA-256 sum of the soup."""
    counters: dict[str, Annotated[int, Field(strict=True)] | None]
    """Entries of the strategy's state that are not tensors."""
    recipe: dict[str, Any]
    """Recipe values by dotted key, without ``RESUME_OVERRIDES`` and baselines."""


@dataclass(frozen=True)
class Checkpoint:
    """A strategy's state after a round."""

    manifest: Manifest
    path: Path
    """File of the soup."""
    soup: AdapterSoup
    tensors: dict[str, Tensor]

    def restore(self, strategy: Strategy) -> None:
        """Load this state into a new strategy. Raise ``ValueError`` if it does not fit."""
        SavedState(self.soup, {**self.tensors, **self.manifest.counters}).restore(strategy)


# ---- writing -------------------------------------------------------------------------------------


def write_soup(folder: Path, round: int, soup: AdapterSoup) -> Path:
    """Write the soup, the first file of a checkpoint; return its path.

    Raises ``RunError`` if the file cannot be written.
    """
    with translated_write_errors(folder):
        folder.mkdir(exist_ok=True)
    path = _soup_path(folder, round)
    soup.save(path)
    return path


def commit(
    folder: Path, round: int, strategy: Strategy, recipe: Recipe, metrics: tuple[int, str]
) -> None:
    """Write the second file of a checkpoint, which completes the round; prune older checkpoints.

    Args:
        folder: The folder in which ``write_soup`` wrote the round's soup.
        round: Number of completed rounds.
        strategy: The strategy after that round.
        recipe: The run's recipe.
        metrics: Length of ``metrics.jsonl`` up to that round, bytes, and the sum of its last line.

    Raises:
        RunError: A file cannot be written or removed, or the round's soup cannot be read.
    """
    state = strategy.state_dict()
    tensors = {
        name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)
    }
    counters = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    manifest = Manifest(
        round,
        *metrics,
        checked.stored_sum(_soup_path(folder, round)),
        counters,
        _fixed_values(recipe),
    )
    checked.write_tensors(_path(folder, round), tensors, strict_json.dumps(asdict(manifest)))
    prune(folder, round)


def prune(folder: Path, round: int) -> None:
    """Remove the checkpoint files of all rounds except ``round`` and the round before it.

    Raises:
        RunError: A file cannot be removed.
    """
    for number in rounds_in(folder):
        if not round - KEEP_LAST < number <= round:
            for path in (_path(folder, number), _soup_path(folder, number)):
                with translated_write_errors(path):
                    path.unlink(missing_ok=True)


# ---- reading -------------------------------------------------------------------------------------


def rounds_in(folder: Path) -> list[int]:
    """Return the rounds that have checkpoint files, complete or not, latest first."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("round-*"))
    return sorted({int(name[1]) for name in names if name}, reverse=True)


def read(folder: Path, round: int) -> Checkpoint:
    """Read and verify a round's checkpoint. Raises ``RunError`` if a file is missing or damaged."""
    path, soup = _path(folder, round), _soup_path(folder, round)
    tensors, note = checked.read_tensors(path)
    try:
        document = strict_json.loads(note)
    except ValueError as error:
        raise checked.damaged(path, f"its manifest cannot be read ({error})") from error
    check(path, document, Manifest)
    manifest = Manifest(**document)
    if manifest.soup_sha256 != checked.stored_sum(soup):
        raise checked.damaged(soup, "it belongs to another round or run")
    return Checkpoint(manifest, soup, AdapterSoup.load(soup, as_stored=True), tensors)


def read_latest(folder: Path, recipe: Recipe, metrics: bytes) -> Checkpoint | None:
    """Read the latest valid checkpoint, and log a warning for each later one that is invalid.

    Checkpoints of incomplete rounds are skipped without a warning.

    Args:
        folder: The folder of the checkpoints.
        recipe: The recipe to resume with.
        metrics: The content of ``metrics.jsonl``.

    Returns:
        The checkpoint, or None if the run must restart from the first round.

    Raises:
        ResumeError: There is no valid checkpoint and more than one round would be lost, or the
            recipe has changed.
    """
    faults = []
    for number in rounds_in(folder):
        if not _path(folder, number).exists():
            continue  # the run was interrupted before the end of this round
        try:
            checkpoint = read(folder, number)
            _check_metrics(folder, checkpoint.manifest, metrics)
        except RunError as error:
            faults.append(checked.without_remedy(error))
            continue
        for fault in faults:
            log.warning("%s. Resuming from the previous checkpoint, after round %d", fault, number)
        _check_recipe(folder, checkpoint.manifest, recipe)
        return checkpoint
    if metrics.count(b"\n") > 1:
        reason = "; ".join(faults) if faults else "it has no checkpoint"
        raise ResumeError(
            f"{folder.parent} cannot be resumed: {reason}. Its undamaged files are still readable; "
            "restore its damaged or missing files from a copy, or start a new run with fedmerge run"
        )
    for fault in faults:
        log.warning("%s. Restarting from the first round", fault)
    return None


def _check_metrics(folder: Path, manifest: Manifest, metrics: bytes) -> None:
    """Raise ``RunError`` unless the metrics up to the checkpoint are undamaged and of its run."""
    path = folder.parent / "metrics.jsonl"
    if len(metrics) < manifest.metrics_bytes:
        raise RunError(
            f"{_path(folder, manifest.round)} cannot be used: {path.name} does not "
            f"reach the end of round {manifest.round}, which this checkpoint includes"
        )
    stored = checked.read_records(path, metrics[: manifest.metrics_bytes])
    if (len(stored.records), stored.sha256) != (manifest.round, manifest.metrics_sha256):
        raise checked.damaged(path, "it belongs to another run")


def _check_recipe(folder: Path, manifest: Manifest, recipe: Recipe) -> None:
    saved, current = manifest.recipe, json.loads(json.dumps(_fixed_values(recipe), default=str))
    if keys := [key for key in saved if key in current and saved[key] != current[key]]:
        changes = "; ".join(
            f"{key} was {written(saved[key])} and is {written(current[key])}" for key in keys
        )
        raise ResumeError(
            f"{folder.parent}: the recipe has changed since round {manifest.round}: {changes}. "
            "Change it back to resume, or start a new run with fedmerge run"
        )


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05}.safetensors"


def _soup_path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05}.soup.safetensors"


def _fixed_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values, except those of baselines, that must not change on resume."""
    return {
        key: value
        for key, value in flat(recipe).items()
        if key not in RESUME_OVERRIDES and key.partition(".")[0] != "baselines"
    }

"""What a run needs to go on after an interruption, written after each round; the newest two are kept.

checkpoint/round-00007.soup.safetensors   the soup; the run's soup.safetensors is a hard link to the newest
checkpoint/round-00007.safetensors        what the strategy remembers; counters, the position in metrics.jsonl, the recipe and SHA-256 sums

The second file is written last, once everything else of the round is on the disk, metrics included: a round counts as done when it is
there. Both are verified when they are read, and where one is damaged the checkpoint before it is used. No random generator's state is
needed: every draw comes from the seed and the round (``seeds.py``). Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import ResumeError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import flat, written
from fedmerge_peft.strategies.base import Strategy
from fedmerge_peft.util.files import atomically, writing
from fedmerge_peft.util.stateful import described

log = logging.getLogger(__name__)

FREE = ("name", "rounds", "evaluation.every", "tracking")
"""The recipe's keys that may change when a run goes on: no client does anything else for them."""
KEPT = 2
"""Checkpoints that are kept."""
_NAME = re.compile(r"round-(\d{5,})(\.soup)?\.safetensors")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says beside its tensors."""

    round: int
    """Rounds done."""
    metrics: int
    """Bytes of ``metrics.jsonl`` that these rounds take."""
    soup: str
    """SHA-256 of the soup's file."""
    counters: dict[str, int | None]
    """What of the strategy's state is no tensor."""
    recipe: dict[str, Any]
    """By dotted key; without what may change."""


@dataclass(frozen=True)
class Checkpoint:
    """A strategy's state after a round, and where the run's other files were."""

    manifest: Manifest
    path: Path
    """The soup's file."""
    soup: AdapterSoup
    tensors: dict[str, Tensor]

    def put_into(self, strategy: Strategy) -> None:
        """Bring a strategy that was just made to this state. Raises ``ValueError`` where it is another one's."""
        ours, theirs = strategy.soup, self.soup
        if (theirs.layout, theirs.rows.shape, theirs.base.keys()) != (
            ours.layout,
            ours.rows.shape,
            ours.base.keys(),
        ):
            raise ValueError(
                f"its soup is {described(theirs.rows)}, or has other parts, where {described(ours.rows)} was expected"
            )
        # copied, as kernels may round otherwise where memory is not aligned as torch does it
        base = {module: tensor.clone() for module, tensor in theirs.base.items()}
        strategy.soup = replace(ours, rows=theirs.rows.clone(), base=base)
        strategy.load_state({**self.tensors, **self.manifest.counters})


# ---- writing -------------------------------------------------------------------------------------


def write_soup(folder: Path, round: int, soup: AdapterSoup) -> Path:
    """The first half of a checkpoint; the path of its file. Raises ``RunError``."""
    with writing(folder):
        folder.mkdir(exist_ok=True)
    path = _soup_path(folder, round)
    atomically(path, soup.save)
    return path


def commit(folder: Path, round: int, strategy: Strategy, recipe: Recipe, metrics: int) -> None:
    """The second half: with it the round is done. Removes what is older than the newest two. Raises ``RunError``.

    Args:
        folder: Where ``write_soup`` has written the round's soup.
        round: Rounds done.
        strategy: After that round.
        recipe: The run's.
        metrics: Bytes of ``metrics.jsonl`` with that round's line.
    """
    state = strategy.state()
    tensors = {
        name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)
    }
    counters = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    with writing(folder):
        manifest = Manifest(
            round, metrics, _file_digest(_soup_path(folder, round)), counters, _fixed(recipe)
        )
        text = json.dumps(asdict(manifest), default=str)
        sums = {"checkpoint": text, "sha256": _digest(tensors, text), "format": "pt"}
        atomically(
            _path(folder, round), lambda temporary: save_file(tensors, temporary, metadata=sums)
        )
    remove_all_but(folder, round)


def remove_all_but(folder: Path, round: int) -> None:
    """Keep the checkpoint of this round and what is kept before it; remove all others, whole or not. Raises ``RunError``."""
    for number in rounds_in(folder):
        if not round - KEPT < number <= round:
            for path in (_path(folder, number), _soup_path(folder, number)):
                with writing(path):
                    path.unlink(missing_ok=True)


# ---- reading -------------------------------------------------------------------------------------


def rounds_in(folder: Path) -> list[int]:
    """The rounds that have checkpoint files, whole or not; the newest first."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("round-*"))
    return sorted({int(name[1]) for name in names if name}, reverse=True)


def read(folder: Path, round: int) -> Checkpoint:
    """The checkpoint after a round, verified. Raises ``RunError`` where a file is missing or is not as it was written."""
    path, soup = _path(folder, round), _soup_path(folder, round)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        if _digest(tensors, metadata["checkpoint"]) != metadata["sha256"]:
            raise RunError(f"{path} is damaged: its SHA-256 sum is not the one that was written")
        manifest = Manifest(**json.loads(metadata["checkpoint"]))
        if manifest.soup != _file_digest(soup):
            raise RunError(f"{soup} is damaged: its SHA-256 sum is not the one that was written")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise RunError(f"{path} cannot be used ({type(error).__name__}: {error})") from error
    return Checkpoint(manifest, soup, AdapterSoup.load(soup), tensors)


def newest(folder: Path, recipe: Recipe, metrics: bytes) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where the run did not come to one, and so goes on from its start.

    Those that are not whole are named in the log.

    Args:
        folder: The checkpoints'.
        recipe: What is to go on.
        metrics: What is in ``metrics.jsonl``.

    Raises:
        ResumeError: None is whole, and more is lost than one round; or they are another recipe's.
    """
    lost = []
    for number in rounds_in(folder):
        if not _path(folder, number).exists():
            continue  # interrupted before this round was done
        try:
            found = read(folder, number)
            if (
                metrics[: found.manifest.metrics].count(b"\n") != number
                or len(metrics) < found.manifest.metrics
            ):
                raise RunError(
                    f"{_path(folder, number)} cannot be used: metrics.jsonl does not hold the {number} rounds it speaks of"
                )
        except RunError as error:
            lost.append(str(error))
            continue
        for fault in lost:
            log.warning("%s. Going on from the checkpoint before it, after round %d", fault, number)
        then, now = found.manifest.recipe, json.loads(json.dumps(_fixed(recipe), default=str))
        if keys := [key for key in then if key in now and then[key] != now[key]]:
            said = "; ".join(
                f"{key} was {written(then[key])} and is {written(now[key])}" for key in keys
            )
            raise ResumeError(
                f"{folder.parent}: the recipe has changed since round {number}: {said}. Change it back to go on"
            )
        return found
    if metrics.count(b"\n") > 1:
        why = "; ".join(lost) if lost else "it kept no checkpoint"
        raise ResumeError(
            f"{folder.parent} cannot go on: {why}. Its finished rounds can be read still; fedmerge run begins anew"
        )
    for fault in lost:
        log.warning("%s. Going on from the start", fault)
    return None


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05}.safetensors"


def _soup_path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:05}.soup.safetensors"


def _fixed(recipe: Recipe) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat(recipe).items()
        if key not in FREE and key.partition(".")[0] != "baselines"
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of a text, and of names, dtypes, shapes and numbers."""
    digest = sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

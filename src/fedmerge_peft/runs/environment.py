"""Describe the environment of a run: format, start time, versions, machine and git commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmerge_peft import distributed
from fedmerge_peft.runs.formats import FORMAT
from fedmerge_peft.util.processor import processor

if TYPE_CHECKING:
    from fedmerge_peft.engines.base import Engine

_PACKAGES = (
    "fedmerge-peft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "safetensors",
    "numpy",
)
_GIT_TIMEOUT = 10
"""Time limit for a git command, seconds."""


def environment_of(engine: Engine) -> dict[str, Any]:
    """Return the content of ``environment.json`` for a run of this engine.

    ``commit`` and ``dirty`` are present only if the package runs from a git checkout.
    """
    device = engine.backbone.device
    return {
        "format": FORMAT,
        "started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "mixed_precision": engine.accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "ranks": distributed.world_size(),
        "packages": {package: version(package) for package in _PACKAGES},
        **source(Path(__file__).parents[1]),
    }


@cache
def source(folder: Path) -> dict[str, Any]:
    """Return a folder's git ``commit``, and ``dirty``: True if its files differ from that commit.

    The result is empty if git is absent, fails, or does not track the folder. It is cached, because
    a running process does not reload its code.
    """
    # An installed package may lie below an unrelated repository, which does not track its files.
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return {}
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", ".")
    return {} if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return git's output; None if git is absent or the command fails."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_GIT_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

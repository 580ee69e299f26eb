"""Where, when and by what a run was made: what ``environment.json`` says."""

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
_PATIENCE = 10
"""Seconds that git may take."""


def environment_of(engine: Engine) -> dict[str, Any]:
    """The start in UTC, versions, device, precision and ranks; ``commit`` and ``dirty`` where the package runs from a git checkout."""
    device = engine.backbone.device
    return {
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
    """``commit``, and whether files in this folder are ``dirty``: not as they are there. Empty where git does not keep the folder.

    Asked once a process, as the code that runs is the code that was loaded.
    """
    if (
        _git(folder, "ls-files", "--error-unmatch", ".") is None
    ):  # such as an installed package below somebody's repository
        return {}
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", ".")
    return {} if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it, or what it was asked for, is not there."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )

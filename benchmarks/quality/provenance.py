"""Provenance of published runs: date, commits, versions and machines."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fedmerge_peft
from fedmerge_peft import Run
from fedmerge_peft.runs.environment import source
from fedmerge_peft.util.processor import processor

RESULTS = Path(__file__).resolve().parents[1] / "results"


def stamp(runs: Iterable[Run]) -> str:
    """Return one line of Markdown: this program's command line, and the provenance of the runs."""
    runs = list(runs)
    return _line([run.environment for run in runs], max(map(_day, runs)))


def stamp_process() -> str:
    """Return the line of ``stamp`` for a page whose numbers were made in this process, today."""
    environment = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "packages": {name: version(name) for name in ("fedmerge-peft", "torch")},
        **source(Path(fedmerge_peft.__file__).parent),
    }
    return _line([environment], f"{datetime.now(UTC):%Y-%m-%d}")


def _line(made: list[dict[str, Any]], newest: str) -> str:
    def each(of: Callable[[dict[str, Any]], str]) -> str:
        return ", ".join(sorted({of(environment) for environment in made}))

    return (
        f"`{shlex.join(['python', *sys.argv])}`, newest run of {newest}, "
        f"{each(_commit)}, fedmerge-peft {each(_version('fedmerge-peft'))}, "
        f"torch {each(_version('torch'))}, {each(_machine)}."
    )


def _day(run: Run) -> str:
    """Return the day on which the run started, or on which its recipe was written."""
    written = datetime.fromtimestamp((run.path / "recipe.yaml").stat().st_mtime, UTC)
    return str(run.environment.get("started") or f"{written:%Y-%m-%d}")[:10]


def _commit(environment: dict[str, Any]) -> str:
    if "commit" not in environment:
        return "unknown commit"
    return f"commit {environment['commit'][:7]}{' (dirty)' if environment.get('dirty') else ''}"


def _version(package: str) -> Callable[[dict[str, Any]], str]:
    return lambda environment: environment.get("packages", {}).get(package, "of unknown version")


def _machine(environment: dict[str, Any]) -> str:
    device, threads = environment.get("device", "unknown device"), environment.get("threads")
    if device != "cpu":
        return str(device)
    processor = environment.get("processor") or "CPU"
    return f"{processor} with {threads or '?'} thread{'s' * (threads != 1)}"

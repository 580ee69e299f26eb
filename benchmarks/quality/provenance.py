"""Where and when a result was made."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedmerge_peft import __version__

RESULTS = Path(__file__).resolve().parents[1] / "results"


def stamp(command: str) -> str:
    """One line of Markdown: command, date, commit, versions, machine."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, commit {commit}, fedmerge-peft {__version__}, torch {torch.__version__}, {_machine()}."
    )


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} thread(s)"

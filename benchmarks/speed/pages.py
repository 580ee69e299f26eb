"""The results page: the provenance of a row, and the sections of an earlier page."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedmerge_peft.runs import environment
from fedmerge_peft.util.processor import processor


def stamp() -> str:
    """Return date, commit, versions, machine and load of the rows.

    The load is the mean number of busy processes of the last 15 minutes, this one included.
    """
    source = environment.source(Path(environment.__file__).parent)
    dirty = " (dirty)" if source.get("dirty") else ""
    where = f"commit {source['commit'][:7]}{dirty}" if source else "unknown commit"
    threads = torch.get_num_threads()
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, "
        f"{processor()} with {threads} thread{'s' * (threads != 1)}, load {os.getloadavg()[2]:.1f}."
    )


def sections(page: str) -> dict[str, str]:
    """Return the text of each row in an earlier page."""
    return dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))

"""What a page of results says of its rows, and where they were measured."""

from __future__ import annotations

import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedmerge_peft.runs import environment


def stamp() -> str:
    """Date, commit, versions and machine of these rows."""
    source = environment.source(Path(environment.__file__).parent)
    dirty = " (dirty)" if source.get("dirty") else ""
    where = f"commit {source['commit'][:7]}{dirty}" if source else "unknown commit"
    threads = torch.get_num_threads()
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{environment.processor()} with {threads} thread{'s' * (threads != 1)} beside other work."
    )


def sections(page: str) -> dict[str, str]:
    """What an earlier page says of each row."""
    return dict(re.findall(r"^## (\w+)\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))

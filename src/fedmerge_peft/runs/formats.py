"""Check the format version of a run directory."""

from __future__ import annotations

from pathlib import Path

from fedmerge_peft.errors import RunError
from fedmerge_peft.util import checked, strict_json

FORMAT = 5
"""Version that this package writes and reads, stored in ``environment.json``."""


def check_format(directory: Path) -> None:
    """Raise ``RunError`` if the run has another format, or its ``environment.json`` is damaged.

    Runs without ``environment.json`` are accepted.
    """
    path = directory / "environment.json"
    if not path.is_file():
        return
    try:
        version = checked.read_document(path).get("format")
    except RunError:
        version = _unchecked_format(path)
        if version in (None, FORMAT):
            raise
    if version != FORMAT:
        raise RunError(
            f"{directory} has run format {version}, but this version of fedmerge-peft reads format "
            f"{FORMAT}: run its recipe again, or read it with the version that wrote it"
        )


def _unchecked_format(path: Path) -> int | None:
    """Return the format of a JSON object without a SHA-256 sum; None for other files.

    A document without an entry ``format`` has format 1.
    """
    try:
        document = strict_json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    version = document.get("format", 1) if isinstance(document, dict) else None
    return version if isinstance(version, int) and "sha256" not in document else None

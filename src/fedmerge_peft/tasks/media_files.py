"""Reading of the image and audio files whose paths are in a table."""

from __future__ import annotations

from pathlib import Path

from fedmerge_peft.util.text import reason


def read_file(path: str) -> bytes:
    """Read a file. Raises ``ValueError`` if it cannot be read, or if the path is empty or a URL."""
    if not path:
        raise ValueError("there are neither bytes nor a path; write the path of a file")
    if "://" in path:
        raise ValueError("URLs are not read; download the files, and write their paths")
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{reason(error)}; relative paths are looked for in the folder of the table (if it is "
            f"a file), then in {Path.cwd()}"
        ) from error

"""Files whose content does not match their name, such as a web page that was saved as a table."""

from __future__ import annotations

from pathlib import Path

_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS; git lfs pull fetches the file"),
    (b"\x1f\x8b", "compressed with gzip; name it .gz, or decompress it"),
    (b"BZh91AY&SY", "compressed with bzip2; name it .bz2, or decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard; name it .zst, or decompress it"),
    (
        b"PK\x03\x04",
        "a zip archive, as spreadsheets and PyTorch files are; unpack it, or save the sheet as csv",
    ),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet or document; save the sheet as csv"),
    (b"PAR1\x15", "a parquet file; name it .parquet"),
    (b"ARROW1\0", "an Arrow file; name it .arrow"),
    (b"FEA1", "a feather file of the first version; write it again with a current pyarrow"),
    (b"%PDF", "a PDF document; save its table as csv"),
    (b"<!doctype html", "a web page, such as an error of a download; download the file again"),
    (b"<html", "a web page, such as an error of a download; download the file again"),
)  # fmt: skip
"""First bytes of each kind of file, and a description with advice after a semicolon. The first
bytes of web pages are in lower case, because the comparison ignores their case."""


def foreign_content(path: Path, own: bytes | None = None) -> str | None:
    """Describe a file, with advice, if it begins like an unexpected kind of file.

    Return None otherwise.

    Args:
        path: File.
        own: First bytes of files of the expected kind; None if that kind has none, such as text.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if own is not None and start.startswith(own):
        return None
    text = start.lstrip().lower()
    return next(
        (
            meaning
            for beginning, meaning in _BEGINNINGS
            if start.startswith(beginning) or text.startswith(beginning)
        ),
        None,
    )

"""Decompress and decode text files."""

from __future__ import annotations

import codecs
from pathlib import Path

import pyarrow as pa

from fedmerge_peft.errors import DataError
from fedmerge_peft.util.foreign_files import foreign_content

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""Arrow's name of each supported compression, by the suffix of the compressed files.

The suffix follows that of the format: ``.csv.gz``.
"""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this mark
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def format_suffix(path: Path) -> str:
    """Return the suffix of a file's format in lower case, without a suffix of its compression."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    return Path(name.removesuffix(compression)).suffix


def read_text(path: Path, encoding: str | None) -> str:
    """Decompress and decode a file.

    Args:
        path: File.
        encoding: Name of the encoding. Default: that of the byte order mark, or UTF-8 without one.

    Raises:
        DataError: The file is not a text file, or its bytes are not text in this encoding. For the
            latter, the message names the line.
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None and (kind := foreign_content(path)):
        raise DataError(f"data.path: {path} is {kind}")
    with pa.input_stream(str(path), compression=compression) as stream:
        content: bytes = stream.read()
    name = encoding or next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(name)
    except UnicodeError as error:
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        remedy = (
            "save the file as UTF-8, or name its encoding, such as data.encoding=cp1252"
            if encoding is None
            else "name another encoding in data.encoding"
        )
        raise DataError(
            f"data.path: {path}:{line}: the bytes are not valid {name} ({error}); {remedy}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        fault = (
            "many NUL characters, so it may be UTF-16 without a byte order mark; name the "
            "encoding, such as data.encoding=utf-16-le"
            if 8 * text.count("\0") > len(text)
            else "a NUL character, which is not text; remove it"
        )
        raise DataError(f"data.path: {path}:{line}: the text has {fault}")
    return text.lstrip("\ufeff")

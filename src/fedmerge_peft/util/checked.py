"""Files that carry the SHA-256 sum of their own content, so that readers notice damage.

document   JSON object whose last entry ``sha256`` covers the text before it
text       text whose last line, ``# sha256: ...``, covers the lines before it
records    one JSON object per line, whose last entry ``sha256`` covers the rest of the line and
           the sum of the previous line, so that the last sum covers the whole file
tensors    safetensors with a sum in the metadata, over names, dtypes, shapes, values and a note

One write contains both content and sum, so no interruption can separate them. The sums detect
accidents. They do not authenticate: whoever writes a file can write its sum.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge_peft.errors import RunError
from fedmerge_peft.util import files, strict_json
from fedmerge_peft.util.row_storage import byte_chunks

T = TypeVar("T")

_KEY = "fedmerge"
"""Metadata key, in a safetensors file, of the sum and the note."""
_END_OF_DOCUMENT = re.compile(rb'\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')
_END_OF_TEXT = re.compile(rb"# sha256: ([0-9a-f]{64})\n\Z")
_END_OF_RECORD = re.compile(rb' "sha256": "([0-9a-f]{64})"}\Z')


class Records(NamedTuple):
    """The content of a file of records."""

    records: list[dict[str, Any]]
    sha256: str
    """Sum of the last complete line; an empty string if the file has none."""


_REMEDY = ". Restore the file from a copy, or start a new run"


class DamagedError(RunError):
    """File that has changed since it was written."""


def damaged(path: Path, reason: str) -> DamagedError:
    """Return the error for a file that has changed since it was written."""
    return DamagedError(f"{path} is damaged: {reason}{_REMEDY}")


def without_remedy(error: Exception) -> str:
    """Return the text of an error, for messages that add their own remedy for a file."""
    return str(error).removesuffix(_REMEDY)


# ---- documents and text --------------------------------------------------------------------------
def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object atomically. Raise ``RunError`` on failure."""
    body = strict_json.dumps(document, indent=2).removesuffix("}").rstrip()
    body += "," if document else ""
    files.write_text(path, f'{body}\n  "sha256": "{_sum(body.encode())}"\n}}\n')


def read_document(path: Path) -> dict[str, Any]:
    """Read and verify a JSON object. Raise ``RunError`` if the file is unreadable or damaged."""
    content = _read(path)
    _verified(path, content, _END_OF_DOCUMENT)
    document = _parsed(path, content)
    del document["sha256"]
    return document


def write_text(path: Path, text: str) -> None:
    """Write text, which must end with a line feed. Raise ``RunError`` on failure."""
    files.write_text(path, f"{text}# sha256: {_sum(text.encode())}\n")


def read_text(path: Path) -> str:
    """Read and verify text. Raise ``RunError`` if the file is unreadable or damaged."""
    try:
        return _verified(path, _read(path), _END_OF_TEXT).decode()
    except UnicodeDecodeError as error:
        raise damaged(path, str(error)) from error


# ---- records -------------------------------------------------------------------------------------
def append_record(path: Path, record: Mapping[str, Any], previous: str) -> tuple[int, str]:
    """Append a line and flush it to disk.

    Args:
        path: File.
        record: Object with at least one entry.
        previous: Sum of the previous line; an empty string for the first line.

    Returns:
        The length of the file in bytes, and the sum of the new line.

    Raises:
        RunError: The file cannot be written.
    """
    text = strict_json.dumps(record, default=float).removesuffix("}") + ","
    digest = _sum(text.encode(), previous)
    with files.translated_write_errors(path), path.open("ab") as file:
        file.write(f'{text} "sha256": "{digest}"}}\n'.encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest


def read_records(path: Path, content: bytes | None = None) -> Records:
    """Read and verify the complete lines of a file; ignore a last line without line feed.

    Args:
        path: File. A missing file has no records.
        content: Bytes to verify in place of the file, such as its first part. Messages name
            ``path`` all the same.

    Raises:
        RunError: The file cannot be read, or a line is damaged.
    """
    if content is None:
        content = _read(path) if path.exists() else b""
    records, previous = [], ""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        place = Path(f"{path}:{number}")
        _verified(place, line, _END_OF_RECORD, previous)
        record = _parsed(place, line)
        previous = record.pop("sha256")
        records.append(record)
    return Records(records, previous)


# ---- tensors -------------------------------------------------------------------------------------
def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: str = "") -> None:
    """Write a safetensors file atomically. Raise ``RunError`` on failure."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = json.dumps({"note": note, "sha256": _tensors_sum(stored, note)})
    files.write_tensors(path, stored, (_KEY, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read and verify the tensors and the note of a safetensors file.

    Raises:
        RunError: The file is missing or damaged.
    """

    def read() -> tuple[dict[str, Tensor], str, str]:
        with safe_open(path, framework="pt") as file:
            metadata = strict_json.loads((file.metadata() or {})[_KEY])
            # safe_open is not a mapping.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, metadata["note"], metadata["sha256"]

    tensors, note, expected = _reading(path, read)
    if not isinstance(note, str) or _tensors_sum(tensors, note) != expected:
        raise damaged(path, "its SHA-256 sum differs from the stored one")
    return tensors, note


def stored_sum(path: Path) -> str:
    """Return the sum stored in a safetensors file, unverified. Raise ``RunError`` on failure."""

    def read() -> str:
        with safe_open(path, framework="pt") as file:
            return str(strict_json.loads((file.metadata() or {})[_KEY])["sha256"])

    return _reading(path, read)


def _reading(path: Path, read: Callable[[], T]) -> T:
    """Return the result of reading a safetensors file; raise ``RunError`` if that fails."""
    try:
        return read()
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing{_REMEDY}") from error
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def _tensors_sum(tensors: Mapping[str, Tensor], note: str) -> str:
    """Return the sum over the note and the tensors' names, dtypes, shapes and values."""
    digest = sha256(note.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        for part in byte_chunks(tensor):
            digest.update(part)
    return digest.hexdigest()


# ---- common --------------------------------------------------------------------------------------
def _sum(content: bytes, previous: str = "") -> str:
    return sha256(previous.encode() + content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing{_REMEDY}") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})") from error


def _verified(path: Path, content: bytes, end: re.Pattern[bytes], previous: str = "") -> bytes:
    """Return the content before its sum. Raise ``RunError`` if the sum is missing or differs."""
    match = end.search(content)
    if match is None:
        raise damaged(path, "it does not end with its SHA-256 sum")
    covered = content[: match.start()]
    if _sum(covered, previous) != match[1].decode():
        raise damaged(path, "its SHA-256 sum differs from the stored one")
    return covered


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if not isinstance(document, dict) or "sha256" not in document:
        raise damaged(path, "it is not a JSON object with a SHA-256 sum")
    return document

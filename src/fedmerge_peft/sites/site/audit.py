"""What left the building: a line of JSON for each message that a site sends, in a file that is only ever added to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

LOG = "audit.jsonl"


@dataclass(frozen=True)
class AuditEntry:
    """One message that a site sent."""

    kind: str
    """What it answered: enrol, open, train, score, adapter."""
    client: str | None = None
    round: int | None = None
    norm: float | None = None
    """‖δ‖₂ of the update as it left, over all of its rows."""
    norm_trained: float | None = None
    """The same before the site's filter."""
    refused: str | None = None
    """Why nothing but this was sent."""


def record(kit: Path, entry: AuditEntry, content: bytes) -> None:
    """Add a line: time (UTC), bytes and SHA-256 of what leaves, and what it is. On the disk before this returns, and so before it leaves.

    Raises ``OSError``: what cannot be written down does not leave.
    """
    said = {
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        **{key: value for key, value in asdict(entry).items() if value is not None},
        "bytes": len(content),
        "sha256": sha256(content).hexdigest(),
    }
    descriptor = os.open(kit / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, (json.dumps(said, ensure_ascii=False) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Audit log of a site: one JSON line for each message that its trainer sends; append-only."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

AUDIT_FILE = "audit.jsonl"


@dataclass(frozen=True)
class AuditEntry:
    """Description of one message that a site is about to send."""

    kind: str
    """Kind of the request that the message answers: enroll, open, train, evaluate or adapter; error
    for an error message."""
    client: str | None = None
    round: int | None = None
    update_norm: float | None = None
    """‖δ‖₂ of the update after clipping and noise, over all of its rows."""
    update_norm_unfiltered: float | None = None
    """‖δ‖₂ of the update before clipping and noise; None if the client failed."""
    error: str | None = None
    """Reason for an error message. A private site may log a reason that it does not send."""


def record(kit: Path, entry: AuditEntry, payload: bytes) -> None:
    """Append a line for a message; the line is on disk when the function returns.

    Args:
        kit: The site's kit.
        entry: Description of the message.
        payload: The serialized message; its size and SHA-256 digest are recorded with the time
            in UTC.

    Raises:
        OSError: The line cannot be written; the message must not be sent.
    """
    line = {
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        **{key: value for key, value in asdict(entry).items() if value is not None},
        "bytes": len(payload),
        "sha256": sha256(payload).hexdigest(),
    }
    descriptor = os.open(kit / AUDIT_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

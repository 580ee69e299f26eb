"""Names shared by operator, server and sites; the named classes are not imported here."""

from __future__ import annotations

CONTROLLER = "fedmerge_peft.sites.flare.controller.FederationController"
EXECUTOR = "fedmerge_peft.sites.flare.executor.SiteExecutor"
TOPIC = "fedmerge"
"""Topic of the commands to a running job: ``{"command": "status"}``, ``"stop"`` or ``"pause"``."""
OUTCOME_FILE = "outcome.json"
"""File with a job's outcome, among the job's files at the server."""
PAYLOAD, ERROR, DEADLINE = "payload", "error", "deadline"
"""Keys in FLARE's tasks and results: the bytes of a message, the reason for the absence of a reply,
and the seconds to wait for a reply."""

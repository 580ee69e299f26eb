"""Names shared by operator, server and sites, without importing the named classes."""

from __future__ import annotations

CONTROLLER = "fedmerge_peft.sites.flare.controller.FederationController"
EXECUTOR = "fedmerge_peft.sites.flare.executor.SiteExecutor"
TOPIC = "fedmerge"
"""Topic of the commands to a running job: ``{"command": "status"}``, ``"stop"`` or ``"pause"``."""
OUTCOME_FILE = "outcome.json"
"""Outcome of a job, among its files at the server."""
PAYLOAD, ERROR, DEADLINE = "payload", "error", "deadline"
"""Keys of a FLARE task: a message's bytes, the reason for none, the seconds to wait for a reply."""

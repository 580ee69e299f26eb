"""What operator, server and sites call the same, without loading what it names."""

from __future__ import annotations

CONTROLLER = "fedmerge_peft.sites.flare.controller.FederationController"
EXECUTOR = "fedmerge_peft.sites.flare.executor.SiteExecutor"
TOPIC = "fedmerge"
"""Of the commands that a running job takes: ``{"do": "look"}``, ``{"do": "stop"}``, ``{"do": "pause"}``."""
OUTCOME = "outcome.json"
"""What a job leaves behind, among its files at the server."""
CONTENT, ERROR, DEADLINE = "content", "error", "deadline"
"""Keys of what travels: a message's bytes, or why there are none, and for how many seconds an answer is waited for."""

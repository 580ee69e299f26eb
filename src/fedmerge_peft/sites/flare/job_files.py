"""Files of an NVIDIA FLARE job. Of this package, they contain only the names of two classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmerge_peft.sites.flare.names import CONTROLLER, EXECUTOR

JOB_NAME = "fedmerge"
_FETCH_INTERVAL = 0.2
"""Seconds between two requests of a site for a task."""
CLIENT_CONFIG: dict[str, Any] = {
    "format_version": 2,
    "executors": [{"tasks": ["*"], "executor": {"path": EXECUTOR, "args": {}}}],
    "task_data_filters": [],
    "task_result_filters": [],
    "components": [],
}
"""Configuration of a job at a site. A site writes this configuration itself (``site_requests``) and
ignores the one that the server deploys."""
SERVER_CONFIG: dict[str, Any] = {
    "format_version": 2,
    "server": {"heart_beat_timeout": 600, "task_request_interval": _FETCH_INTERVAL},
    "task_data_filters": [],
    "task_result_filters": [],
    "components": [],
    "workflows": [{"id": "rounds", "path": CONTROLLER, "args": {}}],
}
_META = {
    "name": JOB_NAME,
    "resource_spec": {},
    "min_clients": 1,
    "deploy_map": {"app": ["@ALL"]},
}


def write_job(folder: Path) -> Path:
    """Write a FLARE job and return its folder.

    The job contains neither recipe nor data: the recipe is in the kits, and the data stay at the
    sites.
    """
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    for path, document in (
        (folder / "meta.json", _META),
        (config / "config_fed_server.json", SERVER_CONFIG),
        (config / "config_fed_client.json", CLIENT_CONFIG),
    ):
        path.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return folder

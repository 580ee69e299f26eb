"""Restriction of NVIDIA FLARE's search for configuration to ``startup/`` and ``local/`` of a kit.

By default, FLARE searches a whole kit, and at the operator the current folder, for configuration
files by name, at any depth and in several formats. It uses the first match. A ``comm_config.json``
among the data, adapters or run directories could make FLARE import modules from any folder that the
file names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.utils.config_service import ConfigService

_initialize = ConfigService.initialize


def search_only_own_files() -> None:
    """Disable FLARE's ``comm_config``, and limit its search to ``startup/`` and ``local/``."""
    CommConfigurator._config_loaded, CommConfigurator._configuration = True, None
    ConfigService.initialize = _initialize_from_own_files


def _initialize_from_own_files(
    section_files: dict[str, str], config_path: list[str], *args: Any, **options: Any
) -> None:
    places = [place for folder in config_path for place in configuration_folders(folder)]
    _initialize(section_files, places, *args, **options)


def configuration_folders(folder: str) -> list[str]:
    """Return a kit's configuration folders; return the folder itself if it is not a kit."""
    parts = [str(Path(folder, part)) for part in ("startup", "local")]
    return parts if Path(parts[0]).is_dir() else [folder]

"""Places where NVIDIA FLARE's processes find configuration: ``startup/`` and ``local/`` of a kit.

FLARE searches a whole kit for the names of its files, and at the operator the current folder, at
any depth. The first file that it finds counts, in any of its formats. A ``comm_config.json`` among
the data, adapters or run directories there would make it import modules from a folder of its
choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.utils.config_service import ConfigService

_initialize = ConfigService.initialize


def search_only_own_files() -> None:
    """Let FLARE find no ``comm_config`` at all, and other files in ``startup/`` and ``local/``."""
    CommConfigurator._config_loaded, CommConfigurator._configuration = True, None
    ConfigService.initialize = _initialize_from_own_files


def _initialize_from_own_files(
    section_files: dict[str, str], config_path: list[str], *args: Any, **options: Any
) -> None:
    places = [place for folder in config_path for place in configuration_folders(folder)]
    _initialize(section_files, places, *args, **options)


def configuration_folders(folder: str) -> list[str]:
    """Return the folders of a kit that hold configuration; the folder itself if it is not a kit."""
    parts = [str(Path(folder, part)) for part in ("startup", "local")]
    return parts if Path(parts[0]).is_dir() else [folder]

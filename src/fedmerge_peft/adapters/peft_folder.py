"""Folders in the format of PEFT's ``save_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmerge_peft.util.files import translated_write_errors, write_json, write_tensors


def highest_rank(config: Mapping[str, Any]) -> int:
    """Return the highest LoRA rank of a PEFT configuration, ``rank_pattern`` included."""
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], **documents: Any
) -> Path:
    """Write the files that ``PeftModel.from_pretrained`` loads.

    Args:
        folder: Destination, which is created if it does not exist.
        state: State dict in PEFT's saved form.
        config: PEFT configuration.
        documents: JSON values, each written to ``<name>.json`` in the folder.

    Returns:
        The folder.

    Raises:
        RunError: The folder cannot be written.
    """
    with translated_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / "adapter_model.safetensors", {key: value.clone() for key, value in state.items()}
    )
    write_json(folder / "adapter_config.json", config)
    for name, document in documents.items():
        write_json(folder / f"{name}.json", document)
    return folder

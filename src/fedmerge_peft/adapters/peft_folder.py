"""An adapter as a folder that PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmerge_peft.util.files import write_json, write_tensors, writing


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], **documents: Any
) -> Path:
    """Write an adapter as a folder that ``PeftModel.from_pretrained`` loads, and each document as ``<name>.json`` beside it.

    Args:
        folder: Where to; made where it is missing.
        state: Tensors in PEFT's saved form.
        config: PEFT's configuration.
        documents: Anything that is JSON.

    Raises:
        RunError: The folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / "adapter_model.safetensors", {key: value.clone() for key, value in state.items()}
    )
    write_json(folder / "adapter_config.json", config)
    for name, document in documents.items():
        write_json(folder / f"{name}.json", document)
    return folder

"""Checks of a model folder's safetensors files, without reading their tensors."""

from __future__ import annotations

import json
from pathlib import Path

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.util.foreign_files import foreign_content
from fedmerge_peft.util.library_errors import library_errors
from fedmerge_peft.util.text import reason

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REAL = {"F64", "F32", "F16", "BF16"}
"""Tensor types that weights may have without quantization."""


def check_weight_files(name: str, folder: Path) -> None:
    """Check the files that transformers reads: ``model.safetensors``, or the files in an index.

    Args:
        name: Name of the model, for error messages.
        folder: Model folder.

    Raises:
        BackboneError: A file is missing, unreadable, damaged, or not a safetensors file; or the
            weights are integers or have 8 bits, and the configuration does not describe their
            quantization.
    """
    quantized = _has_quantization(folder / "config.json")
    for path in _files(name, folder):
        for tensor, kind in _types(path).items():
            if tensor.endswith(".weight") and kind not in _REAL and not quantized:
                raise BackboneError(
                    f"backbone.model: {path} has {tensor} as {kind}, so {name} is quantized, but "
                    "its config.json has no quantization_config; choose a model with weights in "
                    "float32, bfloat16 or float16"
                )


def _files(name: str, folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        place = "" if name == str(folder) else f" in {folder.absolute()}"
        raise BackboneError(
            f"backbone.model: {name} has neither {_SINGLE} nor {_INDEX}{place} "
            f"(but {others}); download the missing file, or save the model again with "
            "save_pretrained of transformers"
        )
    _require_readable(folder / _INDEX)
    with library_errors(
        lambda reason: BackboneError(
            f"backbone.model: {folder / _INDEX} cannot be read: {reason}; download it again"
        )
    ):
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = [folder / file for file in sorted(set(index["weight_map"].values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise BackboneError(
            f"backbone.model: {name} lacks {join_values(missing, 3)}, but {_INDEX} names "
            f"{'this file' if len(missing) == 1 else 'these files'}; download what is missing"
        )
    return files


def _require_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise BackboneError(
            f"backbone.model: {path} cannot be opened: {reason(error)}; check its permissions"
        ) from error


def _types(path: Path) -> dict[str, str]:
    """Return the types of a file's tensors, such as ``F32``, by name."""
    from safetensors import safe_open

    _require_readable(path)

    def fault(reason: str) -> BackboneError:
        if kind := foreign_content(path):
            # The advice after the semicolon is for tables, unless it says how to get the file.
            if "download" not in kind and "fetches" not in kind:
                kind = f"{kind.partition(';')[0]}, not safetensors; write it with save_pretrained"
            return BackboneError(f"backbone.model: {path} is {kind}")
        return BackboneError(
            f"backbone.model: {path} is damaged or incomplete: {reason}; download it again"
        )

    with (
        library_errors(fault),
        safe_open(path, framework="pt") as tensors,
    ):
        return {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118


def _has_quantization(config: Path) -> bool:
    """Return True if a configuration, or a nested one, describes a quantization.

    Return True even if the configuration cannot be read: loading it raises the error.
    """
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    if not isinstance(values, dict):
        return True
    nested = [value for value in values.values() if isinstance(value, dict)]
    return any("quantization_config" in part for part in (values, *nested))

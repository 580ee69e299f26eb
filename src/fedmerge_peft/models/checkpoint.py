"""Checks of a model's weights against its configuration: missing, mismatched and unused tensors.

Transformers initializes missing tensors at random, and ignores tensors that the model does not use.
Both are right for heads and poolers, and wrong for all other modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.weight_files import check_weight_files

ADAPTER_FILE = "adapter_config.json"
_SHOWN = 3


def check_folder(name: str, folder: Path) -> None:
    """Check the files of a model folder.

    A folder with an adapter is refused. Transformers would load the adapter into the model, and the
    run would train on top of it.

    Args:
        name: Name of the model, for error messages.
        folder: Folder.

    Raises:
        BackboneError: There is no configuration or no safetensors file, there is a PEFT adapter, or
            a file of weights is missing, damaged or quantized in an unknown way.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise BackboneError(adapter_found(name))
    if not (folder / "config.json").is_file():
        models = sorted(path.parent.name for path in folder.glob("*/config.json"))
        models_there = f"one of the folders in it: {join_values(models, _SHOWN)}"
        wanted = models_there if models else "a folder that save_pretrained of transformers wrote"
        raise BackboneError(
            f"backbone.model: {name} is not a model folder (no config.json in {folder.absolute()})"
            f"; name {wanted}"
        )
    if not any(folder.glob("*.safetensors")):
        raise BackboneError(
            f"backbone.model: {name} has no safetensors file in {folder.absolute()}; weights in "
            "other formats are not read, because unpickling runs code. Save the model again with "
            "save_pretrained of transformers"
        )
    check_weight_files(name, folder)


def adapter_found(name: str) -> str:
    """Return the message for a model that comes with an adapter."""
    return (
        f"backbone.model: {name} holds a PEFT adapter ({ADAPTER_FILE}); name the base model "
        "alone, or merge the adapter into it first "
        "(PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...))"
    )


def missing_tensors(
    model: Any,
    report: Mapping[str, Any],
    name: str,
    *,
    new_heads: bool,
    unused: Collection[str] = (),
) -> set[str]:
    """Return the names of the tensors in heads and poolers that are not pretrained.

    The checkpoint lacks these tensors, or has them in another shape. Tensors of unused modules are
    left out.

    Args:
        model: Model of transformers, loaded.
        report: Loading information: missing, mismatched and unexpected keys.
        name: Name of the model, for error messages.
        new_heads: True if the task initializes heads and poolers that the checkpoint lacks.
        unused: Names of modules that the task does not read.

    Raises:
        BackboneError: The checkpoint has no weights of this model; a tensor that the task does not
            initialize is missing, or has another shape; the checkpoint has tensors of an adapter,
            of layers beyond the last one in the configuration, or of biases that the configuration
            disables.
    """
    misfit = {key: (tuple(held), tuple(wanted)) for key, held, wanted in report["mismatched_keys"]}
    missing = {
        key
        for key in {*report["missing_keys"], *misfit}
        if not set(unused).intersection(key.split("."))
    }
    body = {key for key in _state_names(model) if not in_head(model, key)}
    if body and body <= missing:
        held = join_values(sorted(report["unexpected_keys"]), _SHOWN) or "none"
        raise BackboneError(
            f"backbone.model: {name} holds no weights of {type(model).__name__} (its tensors: "
            f"{held}; expected: {join_values(sorted(body), _SHOWN)}); save it with save_pretrained "
            "of transformers"
        )
    lacking = {key for key in missing if not (new_heads and in_head(model, key))}
    if lacking:
        first = next((key for key in sorted(lacking) if key in misfit), None)
        shapes = f" ({first} is {misfit[first][0]}, not {misfit[first][1]})" if first else ""
        parts = "only heads and poolers" if new_heads else "none of them"
        raise BackboneError(
            f"backbone.model: the weights of {name} lack {len(lacking)} of the tensors that its "
            f"config.json describes: {join_values(sorted(lacking), _SHOWN)}{shapes}; {parts} may "
            "be missing. Correct config.json, or choose a complete model"
        )
    if adapter := [key for key in report["unexpected_keys"] if ".lora_" in key]:
        raise BackboneError(
            f"backbone.model: the weights of {name} include the weights of an adapter: "
            f"{join_values(sorted(adapter), _SHOWN)}; merge the adapter first "
            "(PeftModel.merge_and_unload), or remove its tensors"
        )
    if ignored := [key for key in report["unexpected_keys"] if _has_no_place(model, key)]:
        raise BackboneError(
            f"backbone.model: the config.json of {name} leaves out {len(ignored)} of its tensors: "
            f"{join_values(sorted(ignored), _SHOWN)}; correct config.json"
        )
    return missing


def in_head(model: nn.Module, key: str) -> bool:
    """Return True if a tensor belongs to a head or a pooler, and not to the pretrained layers.

    The pretrained layers are the module that transformers names in ``base_model_prefix``. If there
    is no such module, they are all direct submodules except the last one that has tensors.

    Args:
        model: Model of transformers.
        key: Name of the tensor.
    """
    module, _, rest = key.partition(".")
    if not rest:  # a tensor of the model itself
        return False
    if "pooler" in key.split("."):
        return True
    base = getattr(model, "base_model_prefix", "")
    if base and isinstance(getattr(model, base, None), nn.Module):
        return module != base
    return module == [name for name, part in model.named_children() if part.state_dict()][-1]


def _has_no_place(model: nn.Module, key: str) -> bool:
    """Return True for a tensor of a layer beyond the last one, or of a disabled bias.

    Return False for all tensors of heads and poolers.
    """
    # In the checkpoint of a model without a head, the names have no prefix.
    names = (key, f"{getattr(model, 'base_model_prefix', '')}.{key}")
    return any(not in_head(model, name) and _is_cut_off(model, name) for name in names)


def _is_cut_off(model: nn.Module, key: str) -> bool:
    path, _, tensor = key.rpartition(".")
    module = model
    for part in path.split("."):
        if isinstance(module, nn.ModuleList) and part.isdecimal() and int(part) >= len(module):
            return True
        inner = getattr(module, part, None)
        if not isinstance(inner, nn.Module):
            return False
        module = inner
    return tensor in module._parameters and module._parameters[tensor] is None


def _state_names(model: nn.Module) -> Collection[str]:
    """Return the names of the parameters in a checkpoint, with one name for tied weights."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name, _ in model.named_parameters() if name not in tied]

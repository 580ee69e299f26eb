"""Copies of models that a Python program passes (``tasks/in_memory.py``).

An unchanged model of transformers is saved to a scratch folder, and loaded from there like a model
from the hub. Any other module is copied. Such a module has these members:

    forward(**batch)   takes the outputs of the tokenizer or image processor by name, and returns
                       logits, or an object or a dictionary with ``logits``
    config             optional, as in transformers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.tasks.in_memory import attached, behavior
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.tasks.in_memory import PassedModel

_NEEDS_TRANSFORMERS = ("attention", "quantization", "device_map", "gradient_checkpointing")


def save_stock(model: nn.Module, folder: Path) -> None:
    """Save an unchanged model of transformers; do nothing for other modules."""
    if not _is_stock(model):
        return
    held: Any = model
    settings = {name: getattr(held, name, None) for name in ("config", "generation_config")}
    try:  # save_pretrained changes these settings
        for name, value in settings.items():
            setattr(held, name, deepcopy(value))
        held.save_pretrained(folder)
    finally:
        for name, value in settings.items():
            setattr(held, name, value)


def copy_module(passed: PassedModel, backbone: BackboneRecipe, device: torch.device) -> Any:
    """Return a copy of a module, with the attributes of transformers' models that a run needs.

    The forward pass of the copy returns an object with ``logits``.

    Raises:
        BackboneError: The module cannot be copied, or the recipe has options that only models of
            transformers support.
    """
    for option in _NEEDS_TRANSFORMERS:
        if getattr(backbone, option):
            raise BackboneError(
                f"backbone.{option}: needs a model of transformers without changed modules or "
                f"hooks, but the {type(passed.model).__name__} that was passed is not one; "
                f"remove backbone.{option}"
            )
    with library_errors(
        lambda reason: BackboneError(
            f"model: the {type(passed.model).__name__} cannot be copied to {device}, and a run "
            f"trains only a copy: {reason}"
        )
    ):
        copy: Any = deepcopy(passed.model).to(device, getattr(torch, backbone.dtype))
    if not hasattr(copy, "config"):
        from transformers import PretrainedConfig

        copy.config = PretrainedConfig()
    for name, value in (("dtype", getattr(torch, backbone.dtype)), ("device", device)):
        if not hasattr(copy, name):
            setattr(copy, name, value)
    copy.register_forward_hook(_with_logits)
    return copy


def linear_layers(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Return the paths of all linear layers outside the heads, for LoRA.

    Args:
        model: The module.
        heads: Names or paths of the heads.

    Raises:
        BackboneError: The model has no such layers.
    """
    paths = [
        path for path, _ in _linear(model) if not any(f".{head}." in f".{path}." for head in heads)
    ]
    if not paths:
        raise BackboneError(
            f"lora.target_modules: {type(model).__name__} has no linear layers besides its head; "
            "name modules for LoRA"
        )
    return paths


def output_layer(model: nn.Module, labels: int) -> str | None:
    """Return the path of the last linear layer, the head.

    Return None if this layer does not have one output per label, or if there is none.
    """
    path, layer = next(reversed(list(_linear(model))), (None, None))
    return path if getattr(layer, "out_features", None) == labels else None


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if path and type(module).__name__ in ("Linear", "Conv1D"):
            yield path, module


def _is_stock(model: nn.Module) -> bool:
    """Return True for a model of transformers that computes what its configuration describes.

    Return False if a program has added hooks, or changed modules or settings.
    """
    from transformers import PreTrainedModel

    kind = type(model)
    if not isinstance(model, PreTrainedModel) or not kind.__module__.startswith("transformers."):
        return False
    if any(attached(module) for module in model.modules()):
        return False
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = kind(deepcopy(model.config))
    except Exception:  # a configuration that the program has changed
        return False
    return _structure(built) == _structure(model)


def _structure(model: nn.Module) -> tuple[list[Any], list[Any]]:
    modules = [(name, type(module), behavior(module)) for name, module in model.named_modules()]
    return modules, [(name, tensor.shape) for name, tensor in model.named_parameters()]


def _with_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return the output with its logits as an attribute."""
    if isinstance(output, Tensor):
        return SimpleNamespace(logits=output)
    if isinstance(output, Mapping) and "logits" in output and not hasattr(output, "logits"):
        return SimpleNamespace(**output)
    if isinstance(getattr(output, "logits", None), Tensor):
        return output
    raise BackboneError(
        f"model: forward() of {type(module).__name__} returns {type(output).__name__}; it must "
        "return logits, or an object or a dictionary with logits"
    )

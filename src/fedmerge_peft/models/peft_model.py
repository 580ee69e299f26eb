"""PEFT model of a backbone: LoRA layers, fully trained heads, random initialization."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge_peft.adapters.lora_factors import RANDOM_INIT_SUFFIXES
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.adapter_names import (
    adaptable_modules,
    check_matches,
    check_names,
    check_rank,
)
from fedmerge_peft.models.in_memory import linear_layers, output_layer
from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.util.library_errors import library_errors


def add_adapter(model: Any, lora: LoraRecipe, task: Task, name: str, missing: set[str]) -> Any:
    """Wrap the model in a PEFT model with a LoRA adapter.

    Args:
        model: Transformers model, or a copy from ``copy_module``.
        lora: Section of the adapter.
        task: Task, which determines the heads.
        name: Name of the model, for error messages.
        missing: Names of tensors that are not pretrained.

    Raises:
        BackboneError: The model does not support the adapter.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    from transformers import PreTrainedModel

    adaptable = adaptable_modules(model)
    head = _output_head(model, lora, task)
    if not isinstance(model, PreTrainedModel):
        lora = _with_targets(model, lora, head, task)
    heads = _heads(model, task, lora.modules_to_save or [], missing)
    if head is not None:
        # PEFT treats every module whose path ends with the name of a head as a head: with the name
        # ``out``, lora_dropout would be one. The whole path is therefore used as the name.
        heads.append(f"base_model.model.{head}")
    _check_trainable(model, lora.modules_to_save or [])
    model_type = getattr(model.config, "model_type", "") or type(model).__name__
    defaults = DEFAULTS.get(model_type, ())
    if lora.target_modules is None and lora.target_parameters is None and not defaults:
        raise BackboneError(
            f"lora.target_modules: PEFT has no default for {model_type}"
            + (
                f"; name some of {', '.join(adaptable)}, or all-linear"
                if adaptable
                else ", and the model has no linear layers to adapt; choose another model"
            )
        )
    check_names(model, lora, defaults, name)
    check_rank(model, lora)
    if lora.bias != "none" and model.dtype != torch.float32:
        raise BackboneError(
            "lora.bias: trained biases are float32, but the other parameters of their layers are "
            f"{str(model.dtype).removeprefix('torch.')}; use backbone.dtype=float32"
        )
    fields = lora.model_dump(exclude={"alpha", "dropout", "merge"}, exclude_none=True)
    if lora.target_modules == "all-linear":
        # PEFT also treats a module such as pre_classifier as a head, and trains it fully.
        last = {module.rpartition(".")[2] for module, _ in model.named_modules()}
        if whole := sorted(name for name in last - {*heads} if name.endswith(tuple(heads))):
            fields["exclude_modules"] = _excluding(lora.exclude_modules, whole)
    with (
        library_errors(
            lambda reason: BackboneError(
                f"lora: {name} does not support this adapter: {reason}; change this "
                "section"
                + (f" (modules that LoRA can adapt: {', '.join(adaptable)})" if adaptable else "")
            )
        ),
        warnings.catch_warnings(),
    ):
        # PEFT uses a deprecated property of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT corrects fan_in_fan_out for each layer.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # PEFT warns about patterns that check_matches refuses.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys")
        config = LoraConfig(
            **{**fields, "modules_to_save": heads or None},
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            # PEFT's classes for tasks pass arguments that other modules do not take.
            task_type=task.peft_task_type if isinstance(model, PreTrainedModel) else None,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        )
        adapted = get_peft_model(model, config)
    check_matches(adapted, lora)
    return adapted


def _output_head(model: nn.Module, lora: LoraRecipe, task: Task) -> str | None:
    """Return the path of the layer that serves as the head of a module from outside transformers.

    This is the last linear layer, if it has one output per label. Return None for models of
    transformers and for tasks without labels. Return None, too, if ``lora.modules_to_save`` is set,
    if a module has the name of one of the task's heads, or if the list ``lora.target_modules``
    names the last linear layer.
    """
    from transformers import PreTrainedModel

    named = any(isinstance(getattr(model, name, None), nn.Module) for name in task.heads)
    if isinstance(model, PreTrainedModel) or named or lora.modules_to_save or not task.labels:
        return None
    head = output_layer(model, len(task.labels))
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    return None if any(f".{head}".endswith(f".{name}") for name in targets) else head


def _with_targets(model: nn.Module, lora: LoraRecipe, head: str | None, task: Task) -> LoraRecipe:
    """Return the section of an adapter with the paths of the layers that LoRA adapts.

    PEFT has no defaults for modules from outside transformers. LoRA adapts all their linear layers
    outside the heads, unless the recipe names other layers.
    """
    unnamed = lora.target_modules is None and lora.target_parameters is None
    if not unnamed and lora.target_modules != "all-linear":
        return lora
    heads = [*task.heads, *(lora.modules_to_save or ())]
    targets = linear_layers(model, [*heads, *filter(None, [head])])
    return lora.model_copy(update={"target_modules": targets})


def _excluding(patterns: str | list[str] | None, names: list[str]) -> str | list[str]:
    """Return ``lora.exclude_modules``, extended by names of modules (the last parts of paths)."""
    if not isinstance(patterns, str):
        return [*(patterns or []), *names]
    return rf"(?:{patterns})|(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def check_reload(model: Any) -> None:
    """Check that PEFT restores all tensors of an adapter when it saves the adapter and loads it.

    PEFT renames the tensors of some models when it saves or loads them, and ignores tensors with
    unknown names. The predictions of an exported adapter would then differ.

    Args:
        model: PEFT model. Its values are restored.

    Raises:
        BackboneError: PEFT fails, or does not restore the value of a trainable tensor.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [tensor.detach().clone() for tensor in tensors]
    with (
        library_errors(
            lambda reason: BackboneError(
                "lora: PEFT cannot load the adapter that it saves for this model: "
                f"{reason}; name other modules in lora.target_modules or "
                "lora.modules_to_save"
            )
        ),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        for number, tensor in enumerate(tensors):
            tensor.fill_(1 + number)  # exact in half precision up to 256, and different from 0
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        state = {key: value.detach().clone() for key, value in state.items()}
        for tensor in tensors:
            tensor.zero_()
        set_peft_model_state_dict(model, state)
        lost = [
            names[id(tensor)]
            for number, tensor in enumerate(tensors)
            if not torch.equal(tensor, torch.full_like(tensor, 1 + number))
        ]
        for tensor, value in zip(tensors, held, strict=True):
            tensor.copy_(value)
    if lost:
        module, factor, _ = lost[0].removeprefix("base_model.model.").partition(".lora_")
        raise BackboneError(
            f"lora: PEFT does not restore {module} when it saves the adapter and loads it again "
            f"({len(lost)} tensor{'s' * (len(lost) > 1)}); "
            + (
                "name the module in lora.exclude_modules"
                if factor
                else "remove the key of lora that trains it, such as bias or modules_to_save, or "
                "choose another model"
            )
        )


def _heads(model: nn.Module, task: Task, requested: list[str], missing: set[str]) -> list[str]:
    """Return the names or paths of the modules to train fully.

    These are the requested ones, the task's heads, and all modules without pretrained weights.
    A module without pretrained weights must be part of the adapter. Otherwise its random values
    would differ each time the adapter is loaded.

    Raises ``BackboneError`` if a module without pretrained weights is outside the other heads, and
    the task has no heads or the module has submodules.
    """
    heads = list(requested)
    heads += [
        name
        for name in task.heads
        if isinstance(getattr(model, name, None), nn.Module) and name not in heads
    ]
    for owner in sorted({key.rpartition(".")[0] for key in missing}):
        if any(
            owner == head or owner.startswith(head + ".") or owner.endswith("." + head)
            for head in heads
        ):
            continue
        if not task.heads or list(model.get_submodule(owner).children()):
            raise BackboneError(
                f"backbone.model: the model lacks weights of {owner}; choose a model that has them"
            )
        heads.append(owner)
    return heads


def _check_trainable(model: nn.Module, requested: Sequence[str]) -> None:
    """Raise ``BackboneError`` if a requested module has integer weights, which are quantized."""
    for name, module in model.named_modules():
        whole = name.endswith(tuple(requested))
        if whole and not all(weight.is_floating_point() for weight in module.parameters()):
            raise BackboneError(
                f"lora.modules_to_save: {name} has quantized weights, which cannot be trained; "
                "name it in lora.target_modules instead, or use a backbone without quantization"
            )


def prepare_heads(model: Any, missing: set[str], outputs: Sequence[str]) -> None:
    """Convert heads to float32, and mark heads without pretrained weights (``fedmerge_fresh``).

    Args:
        model: PEFT model.
        missing: Names of tensors that are not pretrained.
        outputs: Names of heads whose outputs stay in float32. The outputs of other heads are
            converted to the backbone's number format.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.fedmerge_fresh = any(
                key.startswith(name.removeprefix("base_model.model.") + ".") for key in missing
            )
            head = module.modules_to_save["default"]
            head.float()
            head.register_forward_pre_hook(_as_float32)
            if name.removeprefix("base_model.model.") not in outputs:
                # The backbone's next layers expect its number format.
                head.register_forward_hook(lambda module, inputs, output: output.to(model.dtype))


def _as_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the features of a half-precision backbone to float32 for a float32 head."""
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )


def reinitialize(model: Any) -> None:
    """Reinitialize LoRA factors, and heads without pretrained weights, with torch's generator."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    init = model.peft_config["default"].init_lora_weights
    base = model.get_base_model()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            frozen = [
                (p, p.clone())
                for name, p in module.named_parameters()
                if "lora_" in name and not p.requires_grad
            ]
            module.reset_lora_parameters("default", init)
            for parameter, value in frozen:  # a shared A keeps its values
                parameter.copy_(value)
        elif isinstance(module, ModulesToSaveWrapper) and module.fedmerge_fresh:
            buffers = [(b, b.clone()) for b in module.buffers()]
            for part in module.modules_to_save["default"].modules():
                for parameter in part.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # otherwise, transformers skips it
                base._init_weights(part)
            for buffer, value in buffers:  # all adapters share running statistics
                buffer.copy_(value)


def is_random_init(name: str) -> bool:
    """Return True for a factor that is initialized at random, which ``merge: shared_a`` freezes."""
    return name.replace(".default", "").endswith(RANDOM_INIT_SUFFIXES)  # as PEFT saves it

"""The frozen pretrained model, and the one LoRA slot through which every adapter passes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge_peft.adapters.layout import AdapterLayout, Role
from fedmerge_peft.adapters.lora_factors import RANDOM_INIT_SUFFIXES
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.frozen_prefix import find_prefix
from fedmerge_peft.models.pretrained import load_model
from fedmerge_peft.recipe.schema import BackboneRecipe, LoraRecipe
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.util.seeds import derive, seeded

log = logging.getLogger(__name__)

_HEADS = ("classifier", "score")
"""What transformers calls the head of a classifier."""


class Backbone:
    """A frozen model with one adapter slot; adapters pass through it as rows of numbers.

    All trainable tensors are views of one flat vector, so that loading a row, reading it back, clipping its gradient and
    stepping its optimizer are single operations on ``(P,)`` numbers.
    """

    def __init__(
        self,
        model: Any,
        layout: AdapterLayout,
        trainable: Sequence[nn.Parameter],
        shared: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        """The PEFT model; its frozen part is never written to."""
        self.layout = layout
        self.shared = shared
        """Frozen tensors that all adapters have in common, by PEFT's saved name; empty unless ``merge: shared_a``."""
        self.prefix = find_prefix(model)
        """The layers in front of the first that trains; None where there are none."""
        self.trainable = trainable
        """The model's trainable tensors, in the order of the layout."""
        self._pretrained: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.as_pretrained = True
        """Whether the frozen weights are the pretrained ones: ``set_base`` has added nothing."""
        row = torch.cat([parameter.detach().float().flatten() for parameter in trainable])
        self._initial = row.to("cpu", copy=True)
        self.flat = nn.Parameter(row)
        """``(P,)`` float32 on the model's device: the adapter in the slot. ``flat.grad`` collects its gradient."""
        self.flat.grad = torch.zeros_like(row)
        self._bind(self.flat.data, self.flat.grad)

    @property
    def config(self) -> Any:
        """PEFT's LoraConfig."""
        return self.model.peft_config["default"]

    @property
    def scaling(self) -> dict[str, float]:
        """What the update B A of each adapted layer is multiplied by, by module name."""
        from peft.tuners.lora.layer import LoraLayer

        return {
            name: float(module.scaling["default"])
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def load_row(self, row: Tensor) -> None:
        """Put an adapter ``(P,)`` into the slot."""
        with torch.no_grad():
            self.flat.copy_(row)

    def row(self) -> Tensor:
        """A copy of the adapter in the slot, ``(P,)`` float32 on the CPU."""
        return self.flat.detach().to("cpu", copy=True)

    def fresh_row(self, seed: int) -> Tensor:
        """A new random adapter ``(P,)``: LoRA's factors, and the heads that the pretrained model does not have.

        Drawn on the CPU, so that all devices start from the same numbers.
        """
        row = self._initial.clone()
        self._bind(row, None)
        with seeded(seed), torch.no_grad():
            _initialize(self.model)
        self._bind(self.flat.data, self.flat.grad)
        return row

    def load_shared(self, shared: Mapping[str, Tensor]) -> None:
        """Put frozen tensors of the same names and shapes in place of ``shared``: those that some adapters were trained with."""
        from peft import set_peft_model_state_dict

        if shared:
            whole = self.layout.state_dict(
                self.flat.detach().clone()
            )  # PEFT takes no part of an adapter
            set_peft_model_state_dict(self.model, {**whole, **shared})
        self.shared = shared

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """Add ΔW ``(out, in)`` to the pretrained weights of the layers named, in place of what was added before; ``{}`` takes it away.

        Raises ``BackboneError`` for layers whose weights are quantized, or are another layer's too.
        """
        self.as_pretrained = not base
        with torch.no_grad():
            for weight, pretrained in self._pretrained.values():
                weight.copy_(pretrained)
            for name, update in base.items():
                adapted = self.model.get_submodule(name)
                frozen = adapted.base_layer.weight
                if not frozen.is_floating_point():
                    raise BackboneError(
                        f"backbone.quantization: nothing can be added to the quantized weights of {name}; remove it"
                    )
                places = self.model.named_parameters(remove_duplicate=False)
                if name not in self._pretrained and sum(each is frozen for _, each in places) > 1:
                    raise BackboneError(
                        f"lora.target_modules: {name} is tied to another layer, which would change with it; leave it out"
                    )
                weight, pretrained = self._pretrained.setdefault(
                    name, (frozen, frozen.detach().clone())
                )
                weight.copy_(
                    pretrained + (update.T if adapted.fan_in_fan_out else update).to(pretrained)
                )

    def train(self) -> None:
        """Put the model into training mode: dropout is on, except before the first layer that trains (``Prefix.freeze``).

        Running statistics (BatchNorm's) stay as they were pretrained.
        """
        self.model.train()
        if self.prefix is not None:
            self.prefix.freeze()
        for module in self.model.modules():
            if getattr(module, "track_running_stats", False):
                module.eval()

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.model.eval()

    def _bind(self, values: Tensor, gradient: Tensor | None) -> None:
        """Make the model's trainable tensors, and their gradients, views of these vectors."""
        for parameter, entry in zip(self.trainable, self.layout.entries, strict=True):
            parameter.grad = None
            parameter.data = values[entry.columns].view(entry.shape)
            if gradient is not None:
                parameter.grad = gradient[entry.columns].view(entry.shape)


def load_backbone(
    backbone: BackboneRecipe,
    lora: LoraRecipe,
    task: Task,
    folder: str,
    device: torch.device,
    seed: int,
) -> Backbone:
    """Load the model, freeze it, and give it one adapter slot.

    Args:
        backbone: Which model, in which number format.
        lora: The adapter.
        task: Decides the model class, the labels and the padding token.
        folder: Where ``model_folder`` says the model is.
        device: Where the model lives.
        seed: For tensors that the pretrained model does not have.

    Raises:
        BackboneError: The model cannot be loaded, or cannot carry this adapter; says what would do.
    """
    with seeded(derive(seed, "backbone"), device):
        model, missing = load_model(backbone, task, folder, device)
        peft_model = _add_adapter(model, lora, task, backbone.model, missing)
    if backbone.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # reentrant checkpoints need them; here gradients would flow through frozen layers for nothing
    _prepare_heads(peft_model, missing)
    if lora.merge == "shared_a":
        for name, parameter in peft_model.named_parameters():
            if _is_random_init(name):
                parameter.requires_grad_(False)
    peft_model.eval()
    return _with_layout(peft_model)


def _add_adapter(model: Any, lora: LoraRecipe, task: Task, name: str, missing: set[str]) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    adaptable = _adaptable(model)
    if (
        lora.target_modules is None
        and lora.target_parameters is None
        and model.config.model_type not in DEFAULTS
    ):
        raise BackboneError(
            f"lora.target_modules: PEFT has no default for {model.config.model_type}; name some of {', '.join(adaptable)}, or all-linear"
        )
    modules = [module for module, _ in model.named_modules()]
    for field in ("target_modules", "modules_to_save"):
        wanted = getattr(lora, field)
        for target in wanted if isinstance(wanted, list) else []:
            if not any(module == target or module.endswith("." + target) for module in modules):
                raise BackboneError(
                    f"lora.{field}: {name} has no module {target!r}; it has {', '.join(adaptable)}"
                )
    if lora.bias != "none" and model.dtype != torch.float32:
        raise BackboneError(
            "lora.bias: trained biases are float32 and sit inside the backbone's layers; use backbone.dtype=float32"
        )
    fields = lora.model_dump(exclude={"alpha", "dropout", "merge"}, exclude_none=True)
    heads = _heads(model, task, lora.modules_to_save or [], missing)
    config = LoraConfig(
        **{**fields, "modules_to_save": heads or None},
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        task_type=task.peft_task_type,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # PEFT asks transformers for a property by its older name
            warnings.filterwarnings(
                "ignore", message="fan_in_fan_out"
            )  # PEFT sets it right for each layer
            return get_peft_model(model, config)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        re.error,
    ) as error:
        raise BackboneError(
            f"lora: {name} cannot carry this adapter: {str(error).strip().splitlines()[0]} (modules that can: {', '.join(adaptable)})"
        ) from error


def _adaptable(model: nn.Module) -> list[str]:
    """Last names of the layers that LoRA can sit on, in order of appearance."""
    kinds = ("Linear", "Conv1D", "Linear8bitLt", "Linear4bit")
    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in kinds
        )
    )


def _heads(model: nn.Module, task: Task, asked: list[str], missing: set[str]) -> list[str]:
    """Modules to train whole: those that were asked for, a classifier's head, and whatever else the pretrained model lacks.

    What is not pretrained starts random; left frozen and out of the adapter, it would be random again wherever the adapter is used.
    """
    heads = list(asked)
    if task.labels:
        heads += [
            name
            for name in _HEADS
            if isinstance(getattr(model, name, None), nn.Module) and name not in heads
        ]
    for owner in sorted({key.rpartition(".")[0] for key in missing}):
        if any(
            owner == head or owner.startswith(head + ".") or owner.endswith("." + head)
            for head in heads
        ):
            continue
        if not task.labels or list(model.get_submodule(owner).children()):
            raise BackboneError(
                f"backbone.model: the weights of {owner} are not in the model; take a model that has them"
            )
        heads.append(owner)
    return heads


def _prepare_heads(model: Any, missing: set[str]) -> None:
    """Keep heads in float32, and remember which of them are pretrained and so start as they are."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.fedmerge_fresh = any(
                key.startswith(name.removeprefix("base_model.model.") + ".") for key in missing
            )
            head = module.modules_to_save["default"]
            head.float()
            head.register_forward_pre_hook(_as_float32)
            if (
                name.removeprefix("base_model.model.") not in _HEADS
            ):  # what follows inside the backbone expects its number format
                head.register_forward_hook(lambda module, inputs, output: output.to(model.dtype))


def _as_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A half-precision backbone hands half-precision features to its float32 head; autocast decides from there."""
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )


def _initialize(model: Any) -> None:
    """Draw the slot's LoRA factors and fresh heads anew from torch's generator."""
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
            for parameter, value in frozen:  # a shared A stays what it is
                parameter.copy_(value)
        elif isinstance(module, ModulesToSaveWrapper) and module.fedmerge_fresh:
            for part in module.modules_to_save["default"].modules():
                for parameter in part.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # else transformers leaves it as it is
                base._init_weights(part)


def _is_random_init(name: str) -> bool:
    """Whether a parameter is a factor that starts random while its partner starts at zero: one that ``merge: shared_a`` freezes."""
    return name.replace(".default", "").endswith(RANDOM_INIT_SUFFIXES)  # as PEFT saves it


def _with_layout(model: Any) -> Backbone:
    """Find each trainable tensor's saved name by its memory, and lay them out in one row."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    saved = {
        value.data_ptr(): key
        for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    experts = {
        id(p)
        for module in model.modules()
        if isinstance(module, ParamWrapper)
        for p in module.parameters()
    }
    heads = {
        id(p)
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for p in module.parameters()
    }
    trainable = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    if lost := [name for name, parameter in trainable if parameter.data_ptr() not in saved]:
        raise BackboneError(
            f"lora: PEFT would train but not save {lost[0]}, so it could not be merged; remove the option that trains it"
        )
    shared = {
        saved[parameter.data_ptr()]: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and _is_random_init(name) and parameter.data_ptr() in saved
    }

    def role(parameter: nn.Parameter) -> Role:
        if id(parameter) in heads:
            return "head"
        return "expert" if id(parameter) in experts else "lora"

    layout = AdapterLayout.from_tensors(
        (saved[p.data_ptr()], tuple(p.shape), role(p)) for _, p in trainable
    )
    return Backbone(model, layout, [parameter for _, parameter in trainable], shared)

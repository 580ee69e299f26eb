"""Frozen pretrained model with one adapter slot, into which adapters are loaded as flat rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedmerge_peft.adapters.layout import AdapterLayout, Role
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.frozen_prefix import find_prefix
from fedmerge_peft.models.peft_model import (
    add_adapter,
    check_reload,
    is_random_init,
    prepare_heads,
    reinitialize,
)
from fedmerge_peft.models.placement import RemoteTensors, is_remote
from fedmerge_peft.models.pretrained import load_model
from fedmerge_peft.models.weights_digest import weights_digest
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.util.seeds import derive, seeded


class Backbone:
    """Frozen model with one adapter slot.

    All trainable tensors are views of one flat vector ``(P,)``. Loading an adapter, reading it,
    clipping its gradient and stepping its optimizer are single operations on this vector.

    Args:
        model: PEFT model.
        layout: Order, names and shapes of the trainable tensors.
        trainable: Trainable tensors in the order of the layout.
        shared: Frozen tensors that all adapters share, by the name under which PEFT saves them.
        device: Device of the adapter, and of the model's inputs and outputs.
        digest: Digest of the pretrained weights (``weights_digest.py``).
    """

    def __init__(
        self,
        model: Any,
        layout: AdapterLayout,
        trainable: Sequence[nn.Parameter],
        shared: Mapping[str, Tensor],
        device: torch.device,
        digest: str,
    ) -> None:
        self.weights_digest = digest
        """Digest of the pretrained weights, for comparison with those of a run or a site."""
        self.model = model
        """PEFT model. Only ``set_base`` and ``load_shared`` change its frozen tensors."""
        self.layout = layout
        self.shared = shared
        """Frozen tensors that all adapters share: the buffers of heads and, with ``merge:
        shared_a``, the factors with random initial values (A of layers, B of embeddings)."""
        self.prefix = find_prefix(model)
        """Frozen layers before the first trainable layer; None if ``find_prefix`` finds none."""
        self.trainable = trainable
        """Trainable tensors in the order of the layout."""
        self._pretrained: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self.as_pretrained = True
        """True if the frozen weights are the pretrained ones, without updates by ``set_base``."""
        row = torch.cat(
            [parameter.detach().flatten().to(device).float() for parameter in trainable]
        )
        self._initial = row.to("cpu", copy=True)
        self.flat = nn.Parameter(row)
        """Adapter in the slot, ``(P,)`` float32. ``flat.grad`` is its gradient."""
        self.flat.grad = torch.zeros_like(row)
        pairs = list(zip(trainable, layout.entries, strict=True))
        remote = [pair for pair in pairs if is_remote(pair[0], row.device)]
        self._near = [pair for pair in pairs if not is_remote(pair[0], row.device)]
        self._remote = RemoteTensors(model, remote, self.flat.data, self.flat.grad)
        self._bind_slot()

    @property
    def config(self) -> Any:
        """PEFT's LoraConfig."""
        return self.model.peft_config["default"]

    @property
    def model_digest(self) -> str:
        """SHA-256 digest of all that must be equal at the server and at sites.

        It covers the sampled weights, names, shapes, roles and order of an adapter's tensors, and
        names and shapes of the tensors that all adapters share.
        """
        shared = sorted((name, tuple(tensor.shape)) for name, tensor in self.shared.items())
        return sha256(f"{self.layout.to_json()}{shared}{self.weights_digest}".encode()).hexdigest()

    @property
    def scaling(self) -> dict[str, float]:
        """LoRA scaling of the update B A of each adapted layer, by module name."""
        from peft.tuners.lora.layer import LoraLayer

        return {
            name: float(module.scaling["default"])
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    @property
    def device(self) -> torch.device:
        """Device of the adapter, and of the model's inputs and outputs."""
        return self.flat.device

    def load_row(self, row: Tensor) -> None:
        """Load an adapter ``(P,)`` into the slot."""
        with torch.no_grad():
            self.flat.copy_(row)

    def row(self) -> Tensor:
        """Return a copy of the adapter in the slot, ``(P,)`` float32 on the CPU."""
        return self.flat.detach().to("cpu", copy=True)

    def fresh_row(self, seed: int) -> Tensor:
        """Create a randomly initialized adapter ``(P,)``.

        LoRA factors, and heads without pretrained weights, are initialized. The random numbers are
        drawn on the CPU, so they are the same for all devices.
        """
        row = self._initial.clone()
        for parameter, entry in zip(self.trainable, self.layout.entries, strict=True):
            parameter.grad = None
            parameter.data = row[entry.columns].view(entry.shape)
        with seeded(seed), torch.no_grad():
            reinitialize(self.model)
        self._bind_slot()
        return row

    def load_shared(self, shared: Mapping[str, Tensor]) -> None:
        """Replace the shared tensors by tensors of the same names and shapes."""
        from peft import set_peft_model_state_dict

        if shared:
            # PEFT loads complete adapters only.
            current = self.layout.state_dict(self.flat.detach().clone())
            set_peft_model_state_dict(self.model, {**current, **shared})
        self.shared = shared

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """Set the weights of adapted layers to pretrained + ΔW.

        Layers without a ΔW get their pretrained weights. ``{}`` restores the pretrained model.

        Args:
            base: ΔW ``(out, in)`` by module name.

        Raises:
            BackboneError: A layer has quantized weights, or shares its weight with another layer.
        """
        self.as_pretrained = not base
        with torch.no_grad():
            for weight, pretrained in self._pretrained.values():
                weight.copy_(pretrained)
            for name, update in base.items():
                if name not in self._pretrained:
                    self._require_own_weights(name)
                adapted = self.model.get_submodule(name)
                frozen = adapted.base_layer.weight
                weight, pretrained = self._pretrained.setdefault(
                    name, (frozen, frozen.detach().clone())
                )
                weight.copy_(
                    pretrained + (update.T if adapted.fan_in_fan_out else update).to(pretrained)
                )

    def require_base(self) -> None:
        """Raise ``BackboneError`` if ``set_base`` cannot update an adapted linear layer."""
        from peft.tuners.lora.layer import Embedding, ParamWrapper

        for name in self.scaling:
            if not isinstance(self.model.get_submodule(name), (Embedding, ParamWrapper)):
                self._require_own_weights(name)

    def _require_own_weights(self, name: str) -> None:
        frozen = getattr(self.model.get_submodule(name).base_layer, "weight", None)
        if frozen is None or not frozen.is_floating_point():
            raise BackboneError(
                f"backbone.model: the weights of {name} are quantized, and cannot be updated; "
                "choose strategies and baselines that do not update them (flora and fedex_lora "
                "do), or a model without quantization (backbone.quantization: null)"
            )
        parameters = self.model.named_parameters(remove_duplicate=False)
        if sum(parameter is frozen for _, parameter in parameters) > 1:
            raise BackboneError(
                f"lora.target_modules: {name} is tied to another layer, which would change too if "
                "the server updated the weights of this layer (as in flora and fedex_lora); remove "
                "it from the target modules"
            )

    def train(self) -> None:
        """Put the model into training mode.

        Dropout is active except in the frozen prefix (``Prefix.freeze``). Running statistics
        (BatchNorm) do not change.
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

    def _bind_slot(self) -> None:
        """Make the trainable tensors and their gradients views of the adapter in the slot."""
        values, gradient = self.flat.data, cast(Tensor, self.flat.grad)
        for parameter, entry in self._near:
            parameter.grad = None
            parameter.data = values[entry.columns].view(entry.shape)
            parameter.grad = gradient[entry.columns].view(entry.shape)
        self._remote.bind()


def load_backbone(
    backbone: BackboneRecipe,
    lora: LoraRecipe,
    task: Task,
    folder: str,
    device: torch.device,
    seed: int,
) -> Backbone:
    """Load and freeze the model, and add one adapter slot.

    Args:
        backbone: Model and number format.
        lora: Section of the adapter.
        task: Task, which determines model class, labels and padding token.
        folder: Folder or hub id from ``model_folder``.
        device: Device of the model, or of its adapter with ``backbone.device_map``.
        seed: Seed of the LoRA factors, and of tensors that the pretrained model lacks.

    Raises:
        BackboneError: The model cannot be loaded, or does not support the adapter.
    """
    with seeded(derive(seed, "backbone"), device):
        model, missing = load_model(backbone, task, folder, device)
        weights = weights_digest(model, {*missing, *task.unused})
        peft_model = add_adapter(model, lora, task, backbone.model, missing)
    if backbone.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # Only reentrant checkpointing needs gradients with respect to the inputs. If they are
        # disabled, no gradient flows through the layers before the first trainable one.
        model.disable_input_require_grads()
    prepare_heads(peft_model, missing, task.heads)
    if lora.merge == "shared_a":
        for name, parameter in peft_model.named_parameters():
            if is_random_init(name):
                parameter.requires_grad_(False)
    peft_model.eval()
    check_reload(peft_model)
    return _with_layout(peft_model, device, weights)


def _with_layout(model: Any, device: torch.device, weights: str) -> Backbone:
    """Create the backbone. Find the name under which PEFT saves a tensor by its memory address."""
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
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    heads = {id(p) for module in wrappers for p in module.parameters()}
    trainable = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    if lost := [name for name, parameter in trainable if parameter.data_ptr() not in saved]:
        raise BackboneError(
            f"lora: PEFT would train but not save {lost[0]}, so it could not be merged; "
            "remove the option that makes it trainable"
        )
    frozen = [
        parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and is_random_init(name)
    ]
    # PEFT does not load a head without its buffers, such as running statistics.
    frozen += [buffer for module in wrappers for buffer in module.buffers()]
    shared = {
        saved[tensor.data_ptr()]: tensor.detach().to("cpu", torch.float32, copy=True)
        for tensor in frozen
        if tensor.data_ptr() in saved
    }

    def role(parameter: nn.Parameter) -> Role:
        if id(parameter) in heads:
            return "head"
        return "expert" if id(parameter) in experts else "lora"

    layout = AdapterLayout.from_tensors(
        (saved[p.data_ptr()], tuple(p.shape), role(p)) for _, p in trainable
    )
    return Backbone(
        model, layout, [parameter for _, parameter in trainable], shared, device, weights
    )

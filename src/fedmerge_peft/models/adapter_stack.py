"""Stack of adapters on one model, each applied to its own part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge_peft.models.backbone import Backbone

Forward = Callable[..., Tensor]


class AdapterStack:
    """K adapters on one frozen model, each applied to one of K equal, consecutive parts of a batch.

    Frozen weights process the whole batch at once. Adapted linear layers, with LoRA or in a head,
    apply K matrices in one ``bmm``. An example passes only through the adapter of its part.
    Therefore, with respect to one adapter, the gradient of the sum of the parts' losses equals the
    gradient of the loss of the adapter's part.

    Args:
        backbone: Model for which ``stacking_obstacle`` returns None.
        rows: K adapters, ``(K, P)``, on the backbone's device. The stack copies them.
    """

    def __init__(self, backbone: Backbone, rows: Tensor) -> None:
        self.rows = rows.clone(memory_format=torch.contiguous_format)
        """``(K, P)``. In-place changes take effect in the next forward pass."""
        self.gradient = torch.zeros_like(self.rows)
        """``(K, P)``. ``backward`` accumulates gradients here."""
        self.model = backbone.model
        self._backbone = backbone
        self._leaves: dict[int, Tensor] = {}
        """Views of the rows, ``(K, *shape)``, by the ``id`` of the trainable tensor."""
        self.truncate(len(rows))

    def __len__(self) -> int:
        """Return K."""
        return len(self.rows)

    def truncate(self, count: int) -> None:
        """Reduce the stack to its first ``count`` adapters."""
        self.rows, self.gradient = self.rows[:count], self.gradient[:count]
        for parameter, entry in zip(
            self._backbone.trainable, self._backbone.layout.entries, strict=True
        ):
            self._leaves[id(parameter)] = (
                self.rows[:, entry.columns].view(count, *entry.shape).detach().requires_grad_()
            )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, the sum of the parts' losses, to ``gradient``."""
        # Torch warns about leaves whose .grad is not contiguous, such as views of matrix columns.
        gradients = torch.autograd.grad(loss, list(self._leaves.values()), allow_unused=True)
        for entry, gradient in zip(self._backbone.layout.entries, gradients, strict=True):
            if gradient is not None:
                self.gradient[:, entry.columns].view(len(self), *entry.shape).add_(gradient)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the stack instead of the backbone's slot inside the context.

        Backward passes must run inside the context too.
        """
        modules = list(_adapted_modules(self._backbone.model))
        # A module may have its own ``forward``, which Accelerate sets on the instance.
        originals = [vars(module).get("forward") for module in modules]
        for module in modules:
            module.forward = self._forward(module)
        try:
            yield
        finally:
            for module, forward in zip(modules, originals, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _forward(self, module: nn.Module) -> Forward:
        from peft.tuners.lora.layer import LoraLayer

        if isinstance(module, LoraLayer):
            return self._convolution(module) if _is_convolution(module) else self._lora(module)
        return (
            self._layer_norm(module) if isinstance(module, nn.LayerNorm) else self._linear(module)
        )

    def _lora(self, layer: Any) -> Forward:
        """Return a forward pass: W x + scaling · B_k A_k x, as PEFT computes in a linear layer."""
        a: Tensor = layer.lora_A["default"].weight
        b: Tensor = layer.lora_B["default"].weight
        scaling: float = layer.scaling["default"]
        dropout = layer.lora_dropout["default"]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = layer.base_layer(x, *args, **kwargs)
            low = torch.bmm(
                self._by_adapter(dropout(x.to(a.dtype))), self._stacked(a).transpose(1, 2)
            )
            up = self._stacked(b).transpose(1, 2)
            if low.dtype == result.dtype:  # one pass over memory instead of three
                return torch.baddbmm(self._by_adapter(result), low, up, alpha=scaling).view_as(
                    result
                )
            return (result + torch.bmm(low, up).view_as(result) * scaling).to(result.dtype)

        return forward

    def _convolution(self, layer: Any) -> Forward:
        """Return a forward pass: W ∗ x + scaling · B_k ∗ (A_k ∗ x), for one adapter after another.

        Grouped convolutions could compute all adapters at once, but need channels of all adapters
        side by side, which costs a copy of x.
        """
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        scaling: float = layer.scaling["default"]
        dropout = layer.lora_dropout["default"]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = layer.base_layer(x, *args, **kwargs)
            parts = dropout(x.to(down.weight.dtype)).view(len(self), -1, *x.shape[1:])
            factors = zip(self._stacked(down.weight), self._stacked(up.weight), strict=True)
            updates = [
                functional_call(up, {"weight": b}, functional_call(down, {"weight": a}, part))
                for part, (a, b) in zip(parts, factors, strict=True)
            ]
            return (result + torch.cat(updates) * scaling).to(result.dtype)

        return forward

    def _linear(self, layer: Any) -> Forward:
        """Return a forward pass: W_k x + b_k. ``Conv1D`` stores W_kᵀ."""

        def forward(x: Tensor) -> Tensor:
            x = x.to(layer.weight.device)
            weight = self._stacked(layer.weight)
            weight = weight.transpose(1, 2) if isinstance(layer, nn.Linear) else weight
            if layer.bias is None:
                product = torch.bmm(self._by_adapter(x), weight)
            else:
                product = torch.baddbmm(
                    self._stacked(layer.bias)[:, None], self._by_adapter(x), weight
                )
            return product.view(*x.shape[:-1], -1)

        return forward

    def _layer_norm(self, layer: nn.LayerNorm) -> Forward:
        def forward(x: Tensor) -> Tensor:
            x = x.to(layer.weight.device)
            normal = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            scaled = (
                normal.reshape(len(self), -1, *layer.normalized_shape)
                * self._stacked(layer.weight)[:, None]
            )
            if layer.bias is not None:
                scaled = scaled + self._stacked(layer.bias)[:, None]
            return scaled.view_as(normal).to(normal.dtype)

        return forward

    def _stacked(self, parameter: Tensor) -> Tensor:
        """Return the K versions ``(K, *shape)`` of a tensor, on its device.

        A frozen tensor is expanded.
        """
        leaf = self._leaves.get(id(parameter))
        if leaf is None:
            return parameter.expand(len(self), *parameter.shape)
        return leaf.to(parameter.device)

    def _by_adapter(self, x: Tensor) -> Tensor:
        """Reshape the batch to ``(K, positions, width)``."""
        return x.reshape(len(self), -1, x.shape[-1])


def stacking_obstacle(backbone: Backbone) -> str | None:
    """Check the model's modules and configuration for a reason why adapters cannot be stacked.

    Returns:
        The reason as text, or None if there is no known obstacle.
    """
    from peft.tuners.lora.layer import LoraLayer

    model = backbone.model
    if backbone.config.use_dora:
        return "DoRA's magnitudes are not low-rank updates (lora.use_dora)"
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not _is_plain_lora(module):
            kinds = f"{type(module.get_base_layer()).__name__}, {type(module).__name__}"
            return (
                f"{_short_name(name)} is neither a plain linear layer nor a convolution ({kinds})"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            return f"{_short_name(name)} mixes the examples of a batch ({type(module).__name__})"
    stacked = {
        id(tensor) for module in _adapted_modules(model) for tensor in _stacked_tensors(module)
    }
    if _has_experts(model) and (name := _adapted_expert(model)) is not None:
        return f"{name} may see the tokens of some examples only, as experts do"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in stacked:
            return (
                f"{_short_name(name)} is trainable, but is neither a LoRA factor nor part of a "
                "linear layer or LayerNorm that is trained in full"
            )
    return None


def _adapted_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose forward pass the stack replaces.

    These are plain LoRA layers, and linear layers and LayerNorms that are trained in full.
    """
    from peft.tuners.lora.layer import LoraLayer
    from transformers.pytorch_utils import Conv1D

    factors: set[int] = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            factors |= {id(part) for part in module.modules()} - {id(module)}
            if _is_plain_lora(module):
                yield module
        elif type(module) in (nn.Linear, Conv1D, nn.LayerNorm) and id(module) not in factors:
            own = list(module.parameters(recurse=False))
            if own and all(parameter.requires_grad for parameter in own):
                yield module


def _stacked_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors of an adapted module that differ between adapters."""
    from peft.tuners.lora.layer import LoraLayer

    if isinstance(module, LoraLayer):
        return [module.lora_A["default"].weight, module.lora_B["default"].weight]
    return list(module.parameters(recurse=False))


def _is_plain_lora(layer: Any) -> bool:
    """Return True if the layer computes W x + scaling · B A x, example by example.

    The products may be convolutions. W may have 4 bits, because each weight is dequantized alike
    for all examples. W must not have 8 bits: in LLM.int8 (arXiv 2208.07339), all examples of a
    batch determine the columns that are computed in 16 bits. DoRA and embeddings are not plain LoRA
    either.
    """
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    plain = type(layer) is Linear and type(layer.base_layer) in (nn.Linear, Conv1D)
    in_four_bits = type(layer).__name__ == "Linear4bit"  # exists only if bitsandbytes is installed
    return (
        (plain or in_four_bits or _is_convolution(layer))
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
    )


def _is_convolution(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _has_experts(model: nn.Module) -> bool:
    """Return True if the model has experts.

    Its configuration, or one nested in it, then sets a number of experts, or the name of a module's
    class contains ``Experts``.
    """
    from transformers import PretrainedConfig

    names = ("num_experts", "num_local_experts", "n_routed_experts")
    nested = [part for part in vars(model.config).values() if isinstance(part, PretrainedConfig)]
    return any(
        getattr(part, name, None) for part in (model.config, *nested) for name in names
    ) or any("Experts" in type(module).__name__ for module in model.modules())


def _adapted_expert(model: nn.Module) -> str | None:
    """Return the name of an adapted module that may be an expert; None if there is none.

    An expert gets the tokens that are routed to it, so its inputs have no equal parts per adapter.
    Routers and shared experts get all tokens, but each architecture names them differently.
    Therefore, every module in a numbered layer and outside attention may be an expert.
    """
    adapted = {id(module) for module in _adapted_modules(model)}
    attention = [
        name for name, module in model.named_modules() if "Attention" in type(module).__name__
    ]
    for name, module in model.named_modules():
        in_layer = any(part.isdecimal() for part in name.split("."))
        in_attention = any(name.startswith(f"{outer}.") for outer in attention)
        if id(module) in adapted and in_layer and not in_attention:
            return _short_name(name)
    return None


def _short_name(name: str) -> str:
    return name.removeprefix("base_model.model.")

"""Placement of a model on several GPUs of one process (``backbone.device_map``).

The adapter in the slot stays one vector on one device. Its tensors in layers on other devices are
copies: each layer reads its part of the vector before it runs, and adds its gradient to the
vector's gradient afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedmerge_peft import distributed
from fedmerge_peft.adapters.layout import Entry
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.util.text import count_of


def device_map(backbone: BackboneRecipe, device: torch.device) -> str | None:
    """Return the ``device_map`` of transformers for a recipe; None for a model on one device.

    Args:
        backbone: Section of the model.
        device: Device of the run. The model is on several devices only if this is cuda, without a
            number.

    Raises:
        BackboneError: The recipe has a ``device_map``, but there are several ranks, each of which
            has its own GPU.
    """
    ranks = distributed.launched_processes()
    if backbone.device_map is not None and ranks > 1 and device.type == "cuda":
        raise BackboneError(
            "backbone.device_map: distributes the model over all GPUs of one process, but "
            f"{ranks} ranks run, each with its own GPU; start one process without a launcher, or "
            "remove backbone.device_map"
        )
    return backbone.device_map if str(device) == "cuda" else None


def is_distributed(model: Any) -> bool:
    """Return True if the layers of a model are on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def check_placement(model: Any, name: str) -> None:
    """Raise ``BackboneError`` if Accelerate has placed a part of the model outside the GPUs.

    Offloaded layers are copied to a GPU for each pass, which is too slow for training.
    """
    places = set(getattr(model, "hf_device_map", {}).values())
    if outside := sorted(str(place) for place in places if str(place) in ("cpu", "disk")):
        raise BackboneError(
            f"backbone.device_map: {name} does not fit into the memory of "
            f"{count_of(torch.cuda.device_count(), 'GPU')}, and a part of it would be on the "
            f"{' and the '.join(outside)}; use backbone.quantization=4bit, a smaller "
            "backbone.dtype, or more GPUs"
        )


def is_remote(tensor: Tensor, device: torch.device) -> bool:
    """Return True for a tensor on another device."""
    return tensor.device != device


class RemoteTensors:
    """Trainable tensors on other devices than the adapter vector of the slot.

    A forward pass copies the vector's values to the tensors, layer by layer. A backward pass adds
    the tensors' gradients to the vector's gradient.

    Args:
        model: PEFT model.
        tensors: Trainable tensors on other devices, each with its place in the vector.
        values: The vector, ``(P,)``.
        gradient: Gradient of the vector, ``(P,)``.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[tuple[nn.Parameter, Entry]],
        values: Tensor,
        gradient: Tensor,
    ) -> None:
        self._values, self._gradient = values, gradient
        self._storage = [(tensor, tensor.data) for tensor, _ in tensors]
        readers = _readers(model) if tensors else {}
        for tensor, entry in tensors:
            readers[id(tensor)].register_forward_pre_hook(self._reading(tensor, entry))
            added: Callable[..., Any] = tensor.register_post_accumulate_grad_hook
            added(self._adding(entry))

    def bind(self) -> None:
        """Make the tensors use their own memory on their own devices."""
        for tensor, storage in self._storage:
            tensor.grad = None
            tensor.data = storage

    def _reading(self, tensor: Tensor, entry: Entry) -> Callable[..., None]:
        def read(*_: Any) -> None:
            tensor.data.copy_(self._values[entry.columns].view(entry.shape))

        return read

    def _adding(self, entry: Entry) -> Callable[[Tensor], None]:
        def add(tensor: Tensor) -> None:
            own = self._gradient[entry.columns].view(entry.shape)
            own.add_(cast(Tensor, tensor.grad).to(own.device))
            tensor.grad = None

        return add


def _readers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module that reads a tensor in its forward pass, by the ``id`` of the tensor.

    PEFT's layers read tensors of modules that are not called, such as DoRA's magnitudes.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    readers: dict[int, nn.Module] = {}
    for module in model.modules():
        own = module.parameters(recurse=isinstance(module, BaseTunerLayer))
        for tensor in own:
            readers.setdefault(id(tensor), module)
    return readers

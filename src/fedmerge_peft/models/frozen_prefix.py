"""Frozen prefix: the layers before the first trainable layer. Their outputs never change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Prefix:
    """Layers of a model before layer l, the first layer with a trainable tensor.

    Args:
        layers: Layers 0 to l - 1, at least one.
        first: Layer l.
        frozen: All modules that run before layer l, including ``layers``.
    """

    def __init__(self, layers: list[nn.Module], first: nn.Module, frozen: list[nn.Module]) -> None:
        self.layers = layers
        self.first = first
        self.frozen = frozen
        self._entries: int | None = None
        """Length of the tuple that a prefix layer returns, or None if it returns a tensor."""

    def freeze(self) -> None:
        """Put the prefix into evaluation mode, independently of the rest of the model.

        The prefix has no trainable parameters for dropout to regularize. Without dropout, its
        outputs are the same in every step.
        """
        for module in self.frozen:
            module.training = False

    @contextmanager
    def record(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Pass the input of layer l to ``keep`` in each forward pass inside the context.

        The shape is usually ``(batch, length, width)``.
        """

        def record_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(_states(args, kwargs))

        def record_output_length(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._entries = len(output) if isinstance(output, tuple) else None

        handles = [
            self.first.register_forward_pre_hook(record_input, with_kwargs=True),
            self.layers[-1].register_forward_hook(record_output_length),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def states(self, run: Callable[[], object]) -> Tensor:
        """Run a forward pass up to layer l, and return the input of this layer.

        Args:
            run: Function that runs the forward pass.

        Raises:
            RuntimeError: The pass did not reach layer l.
        """

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(_states(args, kwargs))

        handle = self.first.register_forward_pre_hook(end, with_kwargs=True)
        try:
            run()
        except _Reached as reached:
            return reached.states
        finally:
            handle.remove()
        raise RuntimeError("the model did not run its first trainable layer")

    @contextmanager
    def replay(self, states: Tensor) -> Iterator[None]:
        """Skip the layers before l, and pass ``states`` to layer l in passes inside the context.

        Run a forward pass inside ``record`` before the first ``replay``. It shows whether the
        layers return tuples.
        """

        def replace_input(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (
                ((states, *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": states})
            )

        def identity(*args: Any, **kwargs: Any) -> Any:
            hidden = _states(args, kwargs)
            return hidden if self._entries is None else (hidden, *[None] * (self._entries - 1))

        handle = self.first.register_forward_pre_hook(replace_input, with_kwargs=True)
        # A layer may have its own ``forward``, which Accelerate sets on the instance.
        originals = [vars(layer).get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = identity
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(self.layers, originals, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


class _Reached(Exception):  # noqa: N818 - not an error
    """Exception that ends a forward pass at layer l, with the input of this layer."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def prefix_identity(model: nn.Module, prefix: Prefix) -> Iterator[Tensor | str]:
    """Yield everything that determines the input of ``prefix.first``, except batch and rounding.

    The values are the class, the configuration and the attention implementation of the model, the
    number of layers in the prefix, and the frozen tensors of all modules that run before
    ``prefix.first`` or contain it.

    Args:
        model: PEFT model around a model of transformers that runs no code from the hub.
        prefix: The model's prefix.
    """
    base: Any = model.get_base_model()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    frozen = tuple(f"{names[id(module)]}." for module in prefix.frozen)
    first = f"{names[id(prefix.first)]}."
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The folder of the model is not part of its content.
    settings = {
        key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"
    }
    yield f"{type(base).__module__}.{type(base).__qualname__} {len(prefix.layers)}"
    yield str(getattr(base.config, "_attn_implementation", None))
    yield json.dumps(settings, sort_keys=True, default=str)
    for name, tensor in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        owner = name.rpartition(".")[0]
        contains = not owner or first.startswith(f"{owner}.")
        if name not in trainable and (contains or name.startswith(frozen)):
            yield name
            yield tensor


def find_prefix(model: nn.Module) -> Prefix | None:
    """Find the frozen prefix from the model's parameters and the order of its modules.

    The prefix is found if exactly one ``ModuleList`` has layers with trainable tensors, its first
    layer has none, and all other trainable tensors belong to heads after it. A ``ModuleList``
    inside another one is not counted. These conditions are necessary, but not sufficient;
    ``PrefixCache`` verifies the prefix by running the model. A model from outside transformers has
    no prefix, because the order in which its parts run is unknown.

    Returns:
        The prefix, or None.
    """
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel) and not isinstance(model.get_base_model(), PreTrainedModel):
        return None
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _has_trainable(module)
    }
    outer = [name for name in stacks if not any(name.startswith(other + ".") for other in stacks)]
    if len(outer) != 1:  # for example, an encoder and a decoder
        return None
    stack = outer[0]
    layers = list(stacks[stack])
    first = next(index for index, layer in enumerate(layers) if _has_trainable(layer))
    heads = tuple(
        name + "."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    outside = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith(stack + ".")
    ]
    first_name = f"{stack}.{first}"
    before = dict(_modules_before(model, first_name))
    early = tuple(name + "." for name in before)
    if first == 0 or any(not name.startswith(heads) or name.startswith(early) for name in outside):
        return None
    return Prefix(layers[:first], layers[first], list(before.values()))


def _modules_before(model: nn.Module, layer: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that are registered before ``layer`` and do not contain it."""
    for name, module in model.named_modules():
        if name == layer:
            return
        if name and not layer.startswith(name + "."):
            yield name, module


def _has_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a layer's arguments."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states

"""The frozen layers in front of the first layer that trains: what enters that layer is the same for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Prefix:
    """The layers of a model's stack that precede the first layer with a trainable tensor, layer l.

    Args:
        layers: The layers 0 to l - 1; at least one.
        first: Layer l, the first that trains.
        frozen: All modules that run before layer l, those of ``layers`` included.
    """

    def __init__(self, layers: list[nn.Module], first: nn.Module, frozen: list[nn.Module]) -> None:
        self.layers = layers
        self.first = first
        self.frozen = frozen
        self._entries: int | None = None
        """How long the tuple is that such a layer returns, states first; None for the states alone."""

    def freeze(self) -> None:
        """Put the prefix into evaluation mode, whatever mode the rest of the model is in.

        Nothing in it learns, so its dropout would regularise nothing; and without it the states do not change between steps.
        """
        for module in self.frozen:
            module.training = False

    @contextmanager
    def record(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Within, each forward pass hands the states that enter layer l to ``keep``: ``(batch, length, width)`` as a rule."""

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(_states(args, kwargs))

        def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._entries = len(output) if isinstance(output, tuple) else None

        handles = [
            self.first.register_forward_pre_hook(record, with_kwargs=True),
            self.layers[-1].register_forward_hook(remember),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replay(self, states: Tensor) -> Iterator[None]:
        """Within, forward passes leave out the prefix's layers, and layer l gets these states. Record before the first replay."""

        def replay(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (
                ((states, *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": states})
            )

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            same = _states(args, kwargs)
            return same if self._entries is None else (same, *[None] * (self._entries - 1))

        handle = self.first.register_forward_pre_hook(replay, with_kwargs=True)
        own = [
            vars(layer).get("forward") for layer in self.layers
        ]  # some have one that is not their class's, such as accelerate's
        for layer in self.layers:
            layer.forward = pass_on
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def find_prefix(model: nn.Module) -> Prefix | None:
    """The model's frozen prefix, by what its parameters and the order of its modules say; None where there is none.

    That is where one ``ModuleList`` holds layers with trainable tensors, the first of its layers has none, and what else trains is a head
    that comes after. Models that fit this and still do something else are found out by running them (``PrefixCache``).
    """
    from peft.utils import ModulesToSaveWrapper

    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _has_trainable(module)
    }
    outer = [name for name in stacks if not any(name.startswith(other + ".") for other in stacks)]
    if len(outer) != 1:  # an encoder and a decoder, say
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
    entrance = f"{stack}.{first}"
    before = dict(_modules_before(model, entrance))
    early = tuple(name + "." for name in before)
    if first == 0 or any(not name.startswith(heads) or name.startswith(early) for name in outside):
        return None
    return Prefix(layers[:first], layers[first], list(before.values()))


def _modules_before(model: nn.Module, entrance: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are registered before this one and do not contain it."""
    for name, module in model.named_modules():
        if name == entrance:
            return
        if name and not entrance.startswith(name + "."):
            yield name, module


def _has_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a layer's arguments."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states

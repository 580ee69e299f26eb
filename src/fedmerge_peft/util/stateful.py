"""What an object remembers from one round to the next, as plain tensors and JSON values by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

State = dict[str, Tensor | int | None]
"""Tensors and counters by dotted name, such as ``warming.sums``; None stands for a part that has done its work and is gone."""


class Stateful:
    """Something that lives for several rounds: ``remembers`` names the attributes that change with them.

    They are tensors, which keep shape and dtype, counters, or other ``Stateful``, which may be set to None for good. All else
    follows from the recipe and the seed. An object that was just made is brought to where another one was by its ``state_dict()``.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> State:
        """All that is remembered, as it is now; not copied."""
        found: State = {}
        for attribute in self.state_fields:
            name, value = attribute.lstrip("_"), getattr(self, attribute)
            found |= (
                {f"{name}.{key}": part for key, part in value.state_dict().items()}
                if isinstance(value, Stateful)
                else {name: value}
            )
        return found

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        """Take over what ``state_dict`` gave; tensors are copied. Raises ``ValueError`` where it is none of an object made alike."""
        for attribute in self.state_fields:
            name, value = attribute.lstrip("_"), getattr(self, attribute)
            if isinstance(value, Stateful) and name not in state:
                value.load_state_dict(
                    {
                        key.removeprefix(f"{name}."): part
                        for key, part in state.items()
                        if key.startswith(f"{name}.")
                    }
                )
            else:
                setattr(self, attribute, checked_copy(name, value, state.get(name)))
        if other := sorted(self.state_dict().keys() ^ state.keys()):
            raise ValueError(f"{', '.join(other)}: on one side only")


def checked_copy(name: str, ours: object, theirs: Tensor | int | None) -> Tensor | int | None:
    """A copy of what is to be loaded. Raises ``ValueError`` unless it is of our kind, and a tensor of our shape and dtype."""
    if (
        isinstance(ours, Tensor)
        and isinstance(theirs, Tensor)
        and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    ):
        return theirs.clone(memory_format=torch.contiguous_format)
    if (theirs is None and (ours is None or isinstance(ours, Stateful))) or (
        type(ours) is int and type(theirs) is int
    ):
        return theirs
    raise ValueError(f"{name}: {describe(theirs)} does not fit where {describe(ours)} was expected")


def describe(value: object) -> str:
    """A value in a message: a tensor by dtype and shape, a counter by its kind."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    return "nothing" if value is None else f"one {type(value).__name__}"

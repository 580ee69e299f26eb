"""State of an object across rounds: tensors and counters by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

State = dict[str, Tensor | int | None]
"""Tensors and counters by dotted name, such as ``warming.sums``. None marks a discarded part."""


class Stateful:
    """Object whose ``state_fields`` change from round to round.

    A field is a tensor of fixed shape and dtype, a counter, or another ``Stateful``. A ``Stateful``
    field may be set to None, which is permanent. All other attributes follow from the recipe and
    the seed. A new object that loads the ``state_dict()`` of another one has the same state.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> State:
        """Return the current values of all state fields, without copies."""
        state: State = {}
        for attribute in self.state_fields:
            name, value = attribute.lstrip("_"), getattr(self, attribute)
            state |= (
                {f"{name}.{key}": part for key, part in value.state_dict().items()}
                if isinstance(value, Stateful)
                else {name: value}
            )
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        """Load a copy of the ``state_dict`` of an object constructed with the same arguments.

        Raises:
            ValueError: A name, kind, shape or dtype differs from this object's.
        """
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
        if unmatched := sorted(self.state_dict().keys() ^ state.keys()):
            raise ValueError(
                f"{', '.join(unmatched)}: only in the saved state or only in the current one"
            )


def checked_copy(name: str, current: object, loaded: Tensor | int | None) -> Tensor | int | None:
    """Return a copy of ``loaded`` if it can replace the ``current`` value.

    A value of the same kind can replace it; so can None if ``current`` is a ``Stateful``.

    Raises:
        ValueError: ``loaded`` is of another kind, or is a tensor of another shape or dtype.
    """
    if (
        isinstance(current, Tensor)
        and isinstance(loaded, Tensor)
        and (current.shape, current.dtype) == (loaded.shape, loaded.dtype)
    ):
        return loaded.clone(memory_format=torch.contiguous_format)
    if (loaded is None and (current is None or isinstance(current, Stateful))) or (
        type(current) is int and type(loaded) is int
    ):
        return loaded
    raise ValueError(f"{name}: expected {describe(current)}, got {describe(loaded)}")


def describe(value: object) -> str:
    """Describe a value in an error message: a tensor by dtype and shape, a counter by its type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    return "nothing" if value is None else f"one {type(value).__name__}"

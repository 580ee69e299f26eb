"""Copy of a strategy's state, from which a new strategy continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.strategies.base import Strategy
from fedmerge_peft.util.row_buffer import RowBuffer
from fedmerge_peft.util.row_storage import column_chunks, read
from fedmerge_peft.util.stateful import describe
from fedmerge_peft.util.vectors import all_finite, row_norms

_MAX_SOUP_NORM = 1e18
"""Largest valid L2 norm of an adapter on the server. The square of this value fits into float32."""
_SMALL = 2**20
"""Largest size (number of values) of a tensor whose copy always stays in memory."""


@dataclass(frozen=True)
class SavedState:
    """Soup and state of a strategy after a round."""

    soup: AdapterSoup
    state: Mapping[str, Tensor | int | None]

    @classmethod
    def of(cls, strategy: Strategy) -> Self:
        """Copy the state of a strategy; large float32 tensors go to a ``RowBuffer``.

        Rows in bfloat16 or on disk are not copied, because they are never changed in place.
        """
        buffer = RowBuffer()

        def copied(value: Tensor) -> Tensor:
            large = value.dtype == torch.float32 and value.numel() > _SMALL
            return buffer.append(value) if large else value.clone()

        soup = strategy.soup
        base = {module: copied(update) for module, update in soup.base.items()}
        state = {
            name: copied(value) if isinstance(value, Tensor) else value
            for name, value in strategy.state_dict().items()
        }
        rows = copied(soup.rows) if soup.storage.plain else soup.rows
        return cls(replace(soup, rows=rows, base=base), state)

    def restore(self, strategy: Strategy) -> None:
        """Load this state into a new strategy.

        Raises:
            ValueError: The soup or the state does not fit the strategy.
        """
        saved = self.soup
        if len(saved) != len(strategy.soup):
            strategy.resize(len(saved))
        expected = strategy.soup
        if describe(saved.rows) != describe(expected.rows):
            raise ValueError(
                f"its soup is {describe(saved.rows)}, but the strategy expects "
                f"{describe(expected.rows)}"
            )
        if saved.layout != expected.layout:
            raise ValueError("its adapters have other tensors than those of the strategy")
        if saved.base.keys() != expected.base.keys():
            raise ValueError("it updates other layers of the backbone than the strategy")
        # Clone, because kernels may round differently on memory that torch did not align.
        base = {module: tensor.clone() for module, tensor in saved.base.items()}
        strategy.soup = replace(expected.with_rows(saved.rows, len(saved)), base=base)
        strategy.load_state_dict(self.state)

    def fault_of_next(self, strategy: Strategy) -> str | None:
        """Describe a part of the strategy that an update has made unusable; None if there is none.

        The soup, the updates of the backbone and the weights must be finite. Tensors of the state
        must be finite unless they were already not finite in this saved state. The squared norms of
        the adapters must fit into float32.
        """
        soup = strategy.soup
        norms = _norms(soup.rows)
        if not all_finite(norms):
            return "the soup would not be finite"
        parts = {"the weights": strategy.weights}
        parts |= {f"the update of the backbone's {name}": part for name, part in soup.base.items()}
        for name, value in strategy.state_dict().items():
            before = self.state.get(name)
            if isinstance(value, Tensor) and (not isinstance(before, Tensor) or all_finite(before)):
                parts[f"the strategy's state {name}"] = value
        for name, value in parts.items():
            if not all_finite(value):
                return f"{name} would not be finite"
        largest = float(norms.max())
        if largest > _MAX_SOUP_NORM:
            limit = f"the limit of {_MAX_SOUP_NORM:.0e}"
            return f"an adapter would have the norm {largest:.3g}, above {limit}"
        return None


def _norms(rows: Tensor) -> Tensor:
    """Compute ‖Θ_j‖₂, ``(d,)`` float64; not finite if a value of the row is not."""
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for columns in column_chunks(rows):
        squares += row_norms(read(rows, columns)).square()
    return squares.sqrt()

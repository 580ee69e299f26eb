"""Packed batches: examples one after another in rows, with little padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """Mapping of a padded batch's tokens to rows that contain several examples each.

    No row is longer than the longest example, so attention costs no more than with padding. The
    position ids start at 0 in each example. Transformers derives the attention mask from the
    position ids, so that no token attends to another example (``find_packed_sequence_indices``).

    Args:
        mask: Attention mask of the padded batch, ``(batch, length)``.
        adapters: K, the number of adapters in the pass. The batch consists of K equal parts, one
            for each adapter. Each part gets R rows, the largest number that a part needs.
    """

    def __init__(self, mask: Tensor, adapters: int = 1) -> None:
        self._shape = mask.shape
        inside = mask.bool().cpu()
        lengths = inside.sum(dim=1).tolist()
        size = len(lengths) // adapters
        starts = range(0, len(lengths), size)
        parts = [_first_fit(lengths[start : start + size], max(lengths)) for start in starts]
        rows = max(len(part) for part in parts)
        # For each place in the packed rows: the index of the token in the padded batch (-1 for
        # padding), and the position of the token in its example.
        self._source = torch.full((adapters * rows, max(lengths)), -1)
        positions = torch.zeros_like(self._source)
        places = torch.arange(inside.numel()).view(inside.shape)
        for part, start in enumerate(starts):
            for row, members in enumerate(parts[part]):
                end = 0
                for member in members:
                    own = places[start + member][inside[start + member]]
                    columns = slice(end, end := end + len(own))
                    self._source[part * rows + row, columns] = own
                    positions[part * rows + row, columns] = torch.arange(len(own))
        self._source = self._source.to(mask.device)
        self.positions = positions.to(mask.device)
        """Position of each token in its example, ``(K R, longest)``; 0 in padding."""

    def pack(self, values: Tensor) -> Tensor:
        """Move values of a padded batch, ``(batch, length, ...)``, into rows.

        Returns:
            ``(K R, longest, ...)``; zeros for padding.
        """
        packed = values.flatten(0, 1)[self._source.clamp(min=0)]
        packed[self._source < 0] = 0
        return packed

    def unpack(self, values: Tensor) -> Tensor:
        """Move values from rows, ``(K R, longest, ...)``, back to the padded batch.

        Returns:
            ``(batch, length, ...)``; zeros for padding.
        """
        inside = self._source >= 0
        padded = values.new_zeros(self._shape.numel(), *values.shape[2:])
        padded[self._source[inside]] = values[inside]
        return padded.view(*self._shape, *values.shape[2:])

    def in_order(self, values: Tensor, selected: Tensor) -> Tensor:
        """Reorder values of selected tokens from packed rows to the order of the padded batch.

        Args:
            values: Values of the selected tokens, ``(n, ...)``, in the order of the packed rows.
            selected: Mask of the tokens in the packed rows, ``(K R, longest)`` bool with n True.

        Returns:
            ``(n, ...)``.
        """
        return values[self._source[selected].argsort()]


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign each item, the longest first, to the first bin with enough free capacity.

    Returns:
        Indices of the items in each bin.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = next(
            (number for number, left in enumerate(free) if lengths[item] <= left), len(bins)
        )
        if place == len(bins):
            bins.append([])
            free.append(capacity)
        bins[place].append(item)
        free[place] -= lengths[item]
    return bins

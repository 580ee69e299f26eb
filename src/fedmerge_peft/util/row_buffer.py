"""Rows put aside: as many as memory should hold, and the rest in a file."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 2**27
"""Bytes of rows that are worked on at a time; a single row may be larger."""
MEMORY_BYTES = 2**28
"""Bytes of rows that a ``RowBuffer`` holds in memory before it goes on in a file."""


class RowBuffer:
    """Keeps rows side by side, so that several of them are one matrix without a copy (``as_matrix``).

    Beyond ``max_bytes`` bytes (by default ``MEMORY_BYTES``) they lie in a temporary file, in the folder that ``TMPDIR`` names, that is mapped
    into memory: the system takes their pages back when it needs them. The file goes when nothing refers to its rows.
    """

    def __init__(self, max_bytes: int | None = None, expected_calls: int = 1) -> None:
        """``expected_calls`` tells how often ``append`` will be called: with as many rows each time, all of them then lie in one block."""
        self._expected_calls = expected_calls
        self._left = MEMORY_BYTES if max_bytes is None else max_bytes
        self._block = torch.empty(0)
        self._used = 0

    def append(self, rows: Tensor) -> Tensor:
        """A copy of float32 rows ``(k, P)`` that lasts as long as it is referred to."""
        if self._used + rows.numel() > len(self._block):
            self._block, self._used = self._next(rows.numel()), 0
        kept = self._block[self._used : self._used + rows.numel()].view(rows.shape)
        self._used += rows.numel()
        return kept.copy_(rows)

    def _next(self, least: int) -> Tensor:
        """Room for at least so many numbers, and for as many such rows as make a chunk."""
        numbers = least * max(self._expected_calls, CHUNK_BYTES // (4 * least))
        self._left -= 4 * numbers
        if self._left >= 0:
            return torch.empty(numbers)  # what is not used takes no memory
        with TemporaryFile(prefix="fedmerge-") as file:  # the mapping keeps it
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(numbers,)))


def as_matrix(rows: Sequence[Tensor]) -> Tensor:
    """Rows ``(P,)`` as one matrix ``(k, P)``; a view, where they lie in one block at equal distances."""
    first, *others = rows
    starts = [row.storage_offset() for row in rows]
    step = starts[1] - starts[0] if others else first.numel()
    block = first.untyped_storage().data_ptr()
    regular = step >= first.numel() and starts == list(
        range(starts[0], starts[0] + len(rows) * step, step)
    )
    if regular and all(
        row.untyped_storage().data_ptr() == block and row.is_contiguous() for row in rows
    ):
        return first.as_strided((len(rows), first.numel()), (step, 1))
    return torch.stack(list(rows))

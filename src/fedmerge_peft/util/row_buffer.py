"""Buffer of rows: in memory up to a limit, in a memory-mapped temporary file beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 2**27
"""Bytes of a ``RowBuffer``'s block, unless the expected rows need more. Other computations on long
rows process as many bytes at a time."""
MEMORY_BYTES = 2**28
"""Default limit on the bytes that a ``RowBuffer`` holds in memory before it uses files."""


class RowBuffer:
    """Append-only storage of rows in contiguous blocks.

    ``as_matrix`` views rows of one block as a matrix without a copy.

    The first block that would exceed ``max_bytes``, and each later block, is a memory-mapped
    temporary file in ``TMPDIR``. The operating system can evict the pages of a file. A file is
    deleted when nothing refers to its rows.

    Args:
        max_bytes: Limit on the bytes of blocks in memory. Default: ``MEMORY_BYTES``.
        expected_calls: Expected number of calls of ``append``. If all calls append equally many
            rows, all rows are stored in one block.
    """

    def __init__(self, max_bytes: int | None = None, expected_calls: int = 1) -> None:
        self._expected_calls = expected_calls
        self._memory_left = MEMORY_BYTES if max_bytes is None else max_bytes
        self._block = torch.empty(0)
        self._used = 0

    def append(self, rows: Tensor) -> Tensor:
        """Copy float32 rows ``(k, P)`` into the buffer and return the copy.

        The copy stays valid as long as it is referenced.
        """
        if self._used + rows.numel() > len(self._block):
            self._block, self._used = self._allocate(rows.numel()), 0
        stored = self._block[self._used : self._used + rows.numel()].view(rows.shape)
        self._used += rows.numel()
        return stored.copy_(rows)

    def _allocate(self, size: int) -> Tensor:
        """Allocate a block for all expected appends of ``size`` floats each.

        The block has about ``BLOCK_BYTES`` if the expected appends need less.
        """
        numel = size * max(self._expected_calls, BLOCK_BYTES // (4 * size))
        self._memory_left -= 4 * numel
        if self._memory_left >= 0:
            return torch.empty(numel)  # unused pages take no memory
        with TemporaryFile(prefix="fedmerge-") as file:  # the mapping keeps the file alive
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(numel,)))


def as_matrix(rows: Sequence[Tensor]) -> Tensor:
    """Combine rows ``(P,)`` into a matrix ``(k, P)``.

    The result is a view if the rows are in one block, in its order and equally spaced. Otherwise,
    it is a copy.
    """
    first, *others = rows
    offsets = [row.storage_offset() for row in rows]
    stride = offsets[1] - offsets[0] if others else first.numel()
    storage = first.untyped_storage().data_ptr()
    regular = stride >= first.numel() and offsets == list(
        range(offsets[0], offsets[0] + len(rows) * stride, stride)
    )
    if regular and all(
        row.untyped_storage().data_ptr() == storage and row.is_contiguous() for row in rows
    ):
        return first.as_strided((len(rows), first.numel()), (stride, 1))
    return torch.stack(list(rows))

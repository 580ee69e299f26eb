"""Storage of the soup's rows: in float32 or bfloat16, in memory or in a memory-mapped file.

Float32 rows in memory are ordinary tensors. Other rows are read, computed in float32 and written in
chunks of columns. Such rows are never changed in place: new rows replace them, so that a reference
to the old rows keeps the earlier state.

A file has no name and vanishes with its rows, even if the process is killed. Its pages leave the
resident memory of the process as soon as they are copied (``release``). The operating system keeps
as many pages in its cache as fit.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.errors import RunError

CHUNK_BYTES = 2**23
"""Bytes of float32 rows that are computed at a time. Larger chunks exceed the CPU's cache."""
_MAPPINGS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""Mapping of each file, by the address of its first byte."""


@dataclass(frozen=True)
class RowStorage:
    """Number format and place of rows."""

    dtype: torch.dtype = torch.float32
    """float32 or bfloat16."""
    on_disk: bool = False
    folder: Path | None = None
    """Folder of the files. ``TMPDIR`` if it is None or does not exist on this machine."""

    @property
    def plain(self) -> bool:
        """True for float32 rows in memory."""
        return self.dtype == torch.float32 and not self.on_disk

    def empty(self, count: int, size: int) -> Tensor:
        """Allocate rows ``(count, size)``. Raise ``RunError`` if their file cannot be created."""
        if not self.on_disk:
            return torch.empty(count, size, dtype=self.dtype)
        length = count * size * self.dtype.itemsize
        folder = self.folder if self.folder is not None and self.folder.is_dir() else None
        try:
            # The mapping keeps the file alive after the file object is closed.
            with TemporaryFile(prefix="fedmerge-", dir=folder) as file:
                # Without reserved space, a full disk would kill the process in a later write.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, length)
                file.truncate(length)
                mapping = mmap.mmap(file.fileno(), length)
        except OSError as error:
            place = folder or "the folder for temporary files"
            other = "set TMPDIR to another folder" if folder is None else "choose another folder"
            raise RunError(
                f"{place}: a soup of {length / 1e6:,.1f} MB cannot be stored ({error.strerror}); "
                f"free disk space, or {other}"
            ) from error
        rows = torch.frombuffer(mapping, dtype=self.dtype).view(count, size)
        _MAPPINGS[rows.data_ptr()] = mapping
        return rows

    def store(self, rows: Iterable[Tensor], count: int) -> Tensor:
        """Copy ``count`` > 0 rows ``(P,)`` to new rows ``(count, P)`` of this storage.

        Values are rounded to the nearest number in ``dtype``.
        """
        source = iter(rows)
        first = next(source)
        if self.plain:
            return torch.stack([first, *source])
        stored = self.empty(count, len(first))
        for target, row in zip(stored, chain([first], source), strict=True):
            target.copy_(row)
            release(stored)
            release(row)
        return stored


IN_MEMORY = RowStorage()
"""Storage of float32 rows in memory, as ordinary tensors."""


def in_chunks(rows: Tensor) -> bool:
    """Return True for rows that are computed in chunks of columns: bfloat16 rows, rows on disk."""
    return rows.dtype == torch.bfloat16 or on_disk(rows)


def column_chunks(rows: Tensor) -> Iterator[slice]:
    """Yield slices that cover the columns of rows ``(d, P)``: one slice unless ``in_chunks``."""
    if not in_chunks(rows):
        yield slice(None)
        return
    width = max(1, CHUNK_BYTES // (16 * len(rows))) * 4  # as ``StochasticRounding.round`` needs
    for start in range(0, rows.shape[1], width):
        yield slice(start, start + width)


def read(rows: Tensor, columns: slice | Tensor) -> Tensor:
    """Return some columns of rows ``(d, P)``; bfloat16 becomes float32."""
    if not on_disk(rows):
        return rows[:, columns].float() if rows.dtype == torch.bfloat16 else rows[:, columns]
    chunk = torch.empty(len(rows), rows[:1, columns].shape[1])
    for target, row in zip(chunk, rows, strict=True):
        target.copy_(row[columns])
        release(rows)  # the system maps more pages of a row than are read
    return chunk


def write(rows: Tensor, columns: slice, values: Tensor) -> None:
    """Set some columns of rows ``(d, P)`` that were allocated with ``empty``."""
    if not on_disk(rows):
        rows[:, columns] = values
        return
    for target, row in zip(rows, values, strict=True):
        target[columns] = row
        release(rows)


def mix(weights: Tensor, rows: Tensor) -> Tensor:
    """Compute ``weights @ rows`` for weights ``(d,)`` or ``(k, d)``; in float32 for bfloat16."""
    if not in_chunks(rows):
        return weights.to(rows) @ rows
    mixed = torch.empty(*weights.shape[:-1], rows.shape[1])
    for columns in column_chunks(rows):
        mixed[..., columns] = weights.float() @ read(rows, columns)
    return mixed


def on_disk(rows: Tensor) -> bool:
    """Return True for rows in a file of a ``RowStorage``."""
    return _mapping(rows) is not None


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous tensor on the CPU, in order."""
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES].data
        release(tensor)


def release(rows: Tensor) -> None:
    """Remove the pages of rows on disk from this process's resident memory; no values change."""
    if (mapping := _mapping(rows)) is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(rows: Tensor) -> mmap.mmap | None:
    return _MAPPINGS.get(rows.untyped_storage().data_ptr())


class StochasticRounding:
    """Rounding of float32 to bfloat16, up or down at random, so that the mean is exact.

    For a value between two neighbors in bfloat16, the probability of rounding up is the distance
    from the lower neighbor, relative to the gap between them. Rounding to the nearest would cancel
    all steps below half of the gap (0.2 to 0.4 % of a value; Zamirai et al. 2020, arXiv
    2010.06192). The other remedy in that paper is Kahan summation. It needs a second bfloat16
    number for each value, and therefore as much memory as float32.

    There is one draw for each column. All rows share it, so that equal rows stay equal.

    Args:
        seed: Seed of the draws. The same seed gives the same bits.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def round(self, values: Tensor) -> Tensor:
        """Round the next w columns of d rows, ``(d, w)``. Values that are not finite stay so.

        The draws do not depend on the division into chunks, if all chunks but the last have a
        multiple of four columns.
        """
        width = values.shape[1]
        draws = self._bits.random_raw(-(-width // 4)).view(np.uint16)[:width]
        # The upper half of a float32 is a bfloat16. Adding a draw to the lower half carries over
        # with the required probability.
        bits = values.contiguous().view(torch.int32) + torch.from_numpy(draws.astype(np.int32))
        rounded = bits.bitwise_and_(-(2**16)).view(torch.float32)
        return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)

"""Digest of tensors, numbers and texts: equal digests mean bit-identical values."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor


def digest(parts: Iterable[Tensor | int | float | str | None]) -> bytes:
    """Compute a 16-byte BLAKE2b digest of the parts in order, with tensors' dtypes and shapes."""
    state = blake2b(digest_size=16)
    for part in parts:
        if not isinstance(part, Tensor):
            state.update(f"{part!r};".encode())
            continue
        state.update(f"{part.dtype}{tuple(part.shape)};".encode())
        # A tensor with one number may be contiguous with a stride of 0, as after expand.
        plain = part.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        state.update(plain.view(torch.uint8).numpy().data)
    return state.digest()

"""Blocks of an adapter's columns, each with separate merging weights."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout, Entry

Kind = Literal["head", "layers", "modules", "classes"]

_FACTOR = re.compile(r"\.(lora_|modules_to_save)|\.(weight|bias)$")
"""Pattern whose first match marks the end of the module's name in a tensor's saved name."""


@dataclass(frozen=True)
class Blocks:
    """Partition of the P columns of an adapter into B blocks."""

    of: Tensor
    """Block of each column, ``(P,)`` int64, from 0."""

    def __len__(self) -> int:
        return int(self.of.max()) + 1

    @cached_property
    def columns(self) -> list[Tensor]:
        """Columns of each block, as int64 indices."""
        return [torch.nonzero(self.of == block).flatten() for block in range(len(self))]

    @cached_property
    def shares(self) -> Tensor:
        """Fraction of the columns that belong to each block, ``(B,)`` float64."""
        return torch.bincount(self.of).double() / len(self.of)

    @classmethod
    def create(cls, kind: Kind, layout: AdapterLayout) -> Blocks:
        """Divide the columns of a layout.

        Args:
            kind: Blocks to create. ``head``: the head, and all other columns. ``layers``: the
                modules with the same layer number (in an encoder-decoder model, a layer of the
                encoder and one of the decoder), the head, and all other columns. ``modules``: each
                module with trainable tensors, and the head. ``classes``: for each class the columns
                of the head's last layer that produce its logit, and all other columns.
            layout: Layout of the adapter.

        Raises:
            ValueError: All columns form one block.
        """
        names: dict[Hashable, int] = {}
        of = torch.empty(layout.size, dtype=torch.int64)
        for entry in layout.entries:
            of[entry.columns] = names.setdefault(_name(kind, entry), len(names))
        if kind == "classes":
            for entry in filter(None, (layout.classifier, layout.classifier_bias)):
                classes = torch.arange(entry.shape[0]) + len(names)
                of[entry.columns] = classes.repeat_interleave(entry.size // entry.shape[0])
            of = torch.unique(of, return_inverse=True)[1]  # the block "others" may be empty
        if not bool((of != of[0]).any()):
            raise ValueError(f"the kind {kind} leaves all parameters of this adapter in one block")
        return cls(of)


def _name(kind: Kind, entry: Entry) -> Hashable:
    """Return a key that is equal for all tensors of a block.

    For ``classes``, all tensors have the same key; ``create`` then splits off the classes.
    """
    if kind == "classes":
        return "others"
    if entry.role == "head" or kind == "head":
        return entry.role == "head"
    module = entry.key[: match.start()] if (match := _FACTOR.search(entry.key)) else entry.key
    if kind == "modules":
        return module
    return next((part for part in module.split(".") if part.isdecimal()), "others")


@dataclass
class BlockWeights:
    """Merging weights by block: θ_ib = Σ_j π_ijb Θ_jb in the columns of block b.

    A run's ``weights.safetensors`` and its tables contain π_ij, the mean of π_ijb over the columns.
    This class, which the soup's file contains as well, stores the differences from this mean.
    """

    blocks: Blocks
    offsets: Tensor
    """π_ijb − π_ij, ``(m, B, d)`` float32."""

    def add(self, merged: Tensor, rows: Tensor, clients: Tensor) -> None:
        """Add Σ_j (π_ijb − π_ij) Θ_jb to adapters that were merged with π_ij, in place.

        Args:
            merged: Σ_j π_ij Θ_j, ``(P,)`` or ``(k, P)``.
            rows: Θ, ``(d, P)``.
            clients: Share of each client in each adapter, ``(m,)`` or ``(k, m)``; one-hot for the
                adapter of a single client.
        """
        offsets = self.mixed(clients).to(rows)
        for block, columns in enumerate(self.blocks.columns):
            merged[..., columns] += offsets[..., block, :] @ rows[:, columns]

    def mixed(self, clients: Tensor) -> Tensor:
        """Return the offsets ``(B, d)`` of one mixture of clients, or ``(k, B, d)`` of k mixtures.

        Args:
            clients: Share of each client in each mixture, ``(m,)`` or ``(k, m)``.
        """
        mixed: Tensor = torch.tensordot(clients.to(self.offsets), self.offsets, dims=1)
        return mixed

    def spread(self, mask: Tensor) -> BlockWeights:
        """Return these weights for rows to which columns have been added.

        All adapters are 0 in the added columns, so the block of these columns does not matter.

        Args:
            mask: ``(P,)`` bool, False for the added columns.
        """
        of = torch.zeros(len(mask), dtype=torch.int64)
        of[mask] = self.blocks.of
        return BlockWeights(Blocks(of), self.offsets)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as tensors, for a file."""
        return {"of": self.blocks.of, "offsets": self.offsets}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layout: AdapterLayout, adapters: int
    ) -> BlockWeights:
        """Return the weights in a file's tensors, for a soup with this layout and these adapters.

        Raises ``ValueError`` if a tensor does not fit, and ``KeyError`` if one is missing.
        """
        of, offsets = tensors["of"], tensors["offsets"]
        fits = of.dtype == torch.int64 and of.shape == (layout.size,) and layout.size > 0
        if not fits or bool(((of < 0) | (of >= layout.size)).any()):
            raise ValueError("its blocks do not fit its layout")
        blocks = Blocks(of)
        if (
            offsets.dtype != torch.float32
            or offsets.shape[1:] != (len(blocks), adapters)
            or not bool(offsets.isfinite().all())
        ):
            raise ValueError(
                "its merging weights by block do not fit its adapters, or are not finite"
            )
        return cls(blocks, offsets)

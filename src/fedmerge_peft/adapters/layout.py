"""How one adapter, a row of P float32 numbers, maps to the tensors of PEFT's file format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Role = Literal["lora", "expert", "head"]


@dataclass(frozen=True)
class Entry:
    """One trainable tensor and its place in a row."""

    key: str
    """PEFT's saved name, without the adapter's name: ``base_model.model.<module>.lora_A.weight``."""
    shape: tuple[int, ...]
    offset: int
    """First column of the tensor in a row."""
    role: Role
    """``lora`` for low-rank factors and what belongs to them, ``expert`` for those on parameters that hold several experts, ``head`` for
    modules that train whole."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> slice:
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class AdapterLayout:
    """The order, names and shapes of an adapter's tensors; P is ``size``."""

    entries: tuple[Entry, ...]

    @classmethod
    def from_tensors(cls, tensors: Iterable[tuple[str, tuple[int, ...], Role]]) -> AdapterLayout:
        """Lay tensors out one after another, in the order given."""
        entries: list[Entry] = []
        offset = 0
        for key, shape, role in tensors:
            entries.append(Entry(key, tuple(shape), offset, role))
            offset += entries[-1].size
        return cls(tuple(entries))

    @cached_property
    def size(self) -> int:
        """P, the number of trainable numbers."""
        return sum(entry.size for entry in self.entries)

    def state_dict(self, row: Tensor) -> dict[str, Tensor]:
        """Named views of a row ``(P,)``, in PEFT's saved form."""
        self._check(row)
        return {entry.key: row[entry.columns].view(entry.shape) for entry in self.entries}

    def row(self, state: Mapping[str, Tensor]) -> Tensor:
        """One float32 row ``(P,)`` from tensors in PEFT's saved form.

        Raises:
            ValueError: A tensor is missing, left over, or of another shape.
        """
        keys = {entry.key for entry in self.entries}
        if missing := sorted(keys - state.keys()):
            raise ValueError(
                f"the adapter lacks {len(missing)} of {len(keys)} tensors, first {missing[0]}"
            )
        if extra := sorted(state.keys() - keys):
            raise ValueError(
                f"the adapter has {len(extra)} tensors that the layout does not know, first {extra[0]}"
            )
        for entry in self.entries:
            if tuple(state[entry.key].shape) != entry.shape:
                raise ValueError(
                    f"{entry.key} has shape {tuple(state[entry.key].shape)}, expected {entry.shape}"
                )
        return torch.cat(
            [
                state[entry.key].detach().reshape(-1).to("cpu", torch.float32)
                for entry in self.entries
            ]
        )

    def columns(self, role: Role) -> Tensor:
        """Column numbers, int64, of all tensors with this role."""
        parts = [
            torch.arange(entry.offset, entry.offset + entry.size)
            for entry in self.entries
            if entry.role == role
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def to_json(self) -> str:
        """The layout as JSON text, for a file's metadata."""
        return json.dumps([asdict(entry) for entry in self.entries])

    @classmethod
    def from_json(cls, text: str) -> AdapterLayout:
        """Read back what ``to_json`` wrote. Raises ``ValueError`` where the offsets do not add up."""
        layout = cls.from_tensors(
            (entry["key"], tuple(entry["shape"]), entry["role"]) for entry in json.loads(text)
        )
        if [entry.offset for entry in layout.entries] != [
            entry["offset"] for entry in json.loads(text)
        ]:
            raise ValueError("the layout's offsets do not follow from its shapes")
        return layout

    def _check(self, row: Tensor) -> None:
        if row.shape != (self.size,):
            raise ValueError(
                f"an adapter of this layout is a row of {self.size} numbers, got shape {tuple(row.shape)}"
            )

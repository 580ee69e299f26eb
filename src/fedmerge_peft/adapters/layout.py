"""Mapping between a row of P float32 numbers and the tensors of PEFT's file format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedmerge_peft.util import strict_json
from fedmerge_peft.util.ranges import Text, Whole, first_fault

Role = Literal["lora", "expert", "head"]


@dataclass(frozen=True)
class Entry:
    """Trainable tensor and its columns in a row."""

    key: Text
    """Name in PEFT's saved form: ``base_model.model.<module>.lora_A.weight``."""
    shape: tuple[Whole, ...]
    offset: Whole
    """First column of the tensor in a row."""
    role: Role
    """Kind of the tensor.

    ``lora``: low-rank factors, magnitudes and biases. ``expert``: factors of parameters that stack
    several experts. ``head``: fully trained modules.
    """

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> slice:
        """Columns of the tensor in a row."""
        return slice(self.offset, self.offset + self.size)


_ENTRIES = TypeAdapter(tuple[Entry, ...])


@dataclass(frozen=True)
class AdapterLayout:
    """Order, names, shapes and roles of an adapter's tensors. P is ``size``."""

    entries: tuple[Entry, ...]

    @classmethod
    def from_tensors(cls, tensors: Iterable[tuple[str, tuple[int, ...], Role]]) -> AdapterLayout:
        """Create the layout of tensors with these names, shapes and roles, in the given order."""
        entries: list[Entry] = []
        offset = 0
        for key, shape, role in tensors:
            entries.append(Entry(key, tuple(shape), offset, role))
            offset += entries[-1].size
        return cls(tuple(entries))

    @cached_property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return sum(entry.size for entry in self.entries)

    def state_dict(self, row: Tensor) -> dict[str, Tensor]:
        """Return views of a row ``(P,)`` by name, in PEFT's saved form.

        Raises:
            ValueError: The row has the wrong shape.
        """
        self._check(row)
        return {entry.key: row[entry.columns].view(entry.shape) for entry in self.entries}

    def row(self, state: Mapping[str, Tensor]) -> Tensor:
        """Concatenate tensors in PEFT's saved form into a float32 row ``(P,)``, on the CPU.

        Raises:
            ValueError: A tensor is missing, unknown, or has the wrong shape.
        """
        keys = {entry.key for entry in self.entries}
        if missing := sorted(keys - state.keys()):
            raise ValueError(
                f"the adapter lacks {len(missing)} of {len(keys)} tensors, first {missing[0]}"
            )
        if extra := sorted(state.keys() - keys):
            raise ValueError(
                f"the adapter has {len(extra)} tensors that are not in the layout, first {extra[0]}"
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
        """Return the columns of all tensors with this role, as int64 indices."""
        parts = [
            torch.arange(entry.offset, entry.offset + entry.size)
            for entry in self.entries
            if entry.role == role
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    @cached_property
    def classifier(self) -> Entry | None:
        """Last matrix of the head, ``(classes, features)``; None if the head has no matrix."""
        matrices = [e for e in self.entries if e.role == "head" and len(e.shape) == 2]
        return matrices[-1] if matrices else None

    @cached_property
    def classifier_bias(self) -> Entry | None:
        """Bias of the layer of ``classifier``, ``(classes,)``; None if there is no such bias."""
        if self.classifier is None:
            return None
        key, shape = self.classifier.key.removesuffix("weight") + "bias", self.classifier.shape[:1]
        return next((e for e in self.entries if (e.key, e.shape) == (key, shape)), None)

    def select(self, keep: Callable[[Entry], bool]) -> tuple[AdapterLayout, Tensor]:
        """Return the layout of the tensors to keep, and a mask ``(P,)`` of their columns."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for entry in self.entries:
            mask[entry.columns] = keep(entry)
        kept = [(entry.key, entry.shape, entry.role) for entry in self.entries if keep(entry)]
        return AdapterLayout.from_tensors(kept), mask

    def to_json(self) -> str:
        """Serialize the layout as JSON, for the metadata of a file."""
        return json.dumps([asdict(entry) for entry in self.entries])

    @classmethod
    def from_json(cls, text: str) -> AdapterLayout:
        """Deserialize the output of ``to_json``.

        Raises:
            ValueError: A field is invalid, a key is given twice, or the offsets do not match the
                shapes.
        """
        try:
            entries = _ENTRIES.validate_python(strict_json.loads(text))
        except ValidationError as invalid:
            raise ValueError(first_fault(invalid)) from invalid
        layout = cls.from_tensors((entry.key, entry.shape, entry.role) for entry in entries)
        if layout.entries != entries:
            raise ValueError("the layout's offsets do not match its shapes")
        if len({entry.key for entry in entries}) < len(entries):
            raise ValueError("the layout has two tensors of the same name")
        return layout

    def _check(self, row: Tensor) -> None:
        if row.shape != (self.size,):
            raise ValueError(
                f"an adapter of this layout has shape ({self.size},), got {tuple(row.shape)}"
            )

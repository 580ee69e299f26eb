"""Model soup: a matrix of d adapters on one backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedmerge_peft.adapters.blocks import BlockWeights
from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.util.checked import damaged, read_tensors, write_tensors
from fedmerge_peft.util.html import page, table
from fedmerge_peft.util.row_storage import IN_MEMORY, RowStorage, mix

_SHARED = "shared."
_BASE = "base."
_OWN = "own."
_BLOCKS = "blocks."
_MAX_SHOWN = 50
"""Largest number of adapters that a notebook shows."""


@dataclass
class OwnParts:
    """Own parts of the clients' adapters in some columns, such as the columns of the head.

    θ_i = Σ_j π_ij Θ_j + U_i, where U_i is 0 in all other columns.

    Columns that are private to the clients are 0 in Θ, so U_i alone is the client's adapter there.
    """

    columns: Tensor
    """Columns of a row, ``(c,)`` int64."""
    residuals: Tensor
    """U, ``(m, c)`` float32."""
    private: bool = False
    """True if some of the columns are private, so that only clients have whole adapters."""

    def plus(self, other: OwnParts) -> OwnParts:
        """Return the sum of two own parts, which has the columns of both."""
        columns = torch.unique(torch.cat([self.columns, other.columns]))
        residuals = torch.zeros(len(self.residuals), len(columns))
        for part in (self, other):
            residuals[:, torch.searchsorted(columns, part.columns)] += part.residuals
        return OwnParts(columns, residuals, self.private or other.private)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as tensors, for a file."""
        private = torch.tensor(self.private)
        return {"columns": self.columns, "residuals": self.residuals, "private": private}


@dataclass
class AdapterSoup:
    """Θ: d adapters, one per row.

    Merging is ``π @ Θ``, the paper's θ_i = Σ_j π_ij Θ_j (arXiv 2504.06768). It averages LoRA's A
    and B separately. ``fedmerge_peft.merge_error`` measures the distance to the average of the
    products B A.
    """

    rows: Tensor
    """Θ, ``(d, P)``, float32 or bfloat16."""
    layout: AdapterLayout
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen tensors that all adapters share, by PEFT's saved name: with ``merge: shared_a`` the
    factors A (of embeddings, B), and the buffers of heads, such as running statistics."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """Updates ΔW ``(out, in)`` of the backbone's own weights, by module name.

    ``merge`` and ``state_dict`` ignore them. ``Backbone.set_base`` and
    ``exact_merge.add_base_update`` apply them.
    """
    own: OwnParts | None = None
    """Own parts of the clients' adapters; None if their adapters have no own parts."""
    blocks: BlockWeights | None = None
    """Merging weights by block; None if they are the same in all columns."""
    storage: RowStorage = IN_MEMORY
    """Storage of the rows on the server. Loaded soups have the default."""

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != self.layout.size:
            raise ValueError(
                f"a soup of this layout has shape (d, {self.layout.size}), "
                f"got {tuple(self.rows.shape)}"
            )

    def _repr_html_(self) -> str:
        megabytes = 4 * self.layout.size / 1e6
        title = f"{len(self.rows)} adapters of {self.layout.size:,} parameters ({megabytes:.2f} MB)"
        if len(self.rows) == 1:
            title = title.replace("adapters", "adapter", 1)
        mean = mix(torch.full((len(self.rows),), 1 / len(self.rows)), self.rows)
        rows = [
            (str(number), f"{row.float().norm():.3g}", f"{(row - mean).norm():.3g}")
            for number, row in enumerate(self.rows[:_MAX_SHOWN])
        ]
        more = len(self.rows) - len(rows)
        note = f"<p>and {more} more</p>" if more else ""
        return page(title, table(["adapter", "‖Θ_j‖₂", "‖Θ_j − mean‖₂"], rows), note)

    def __len__(self) -> int:
        return len(self.rows)

    def merge(self, weights: Tensor, clients: Tensor | None = None) -> Tensor:
        """Merge adapters with weights ``(d,)`` or ``(k, d)`` into rows ``(P,)`` or ``(k, P)``.

        Args:
            weights: π.
            clients: Share of each client in each row, ``(m,)`` or ``(k, m)``; one-hot for the
                adapter of a single client. A row contains the clients' own parts, and uses their
                weights by block, in proportion to these shares. If None, rows have no own parts,
                and ``weights`` applies to all blocks.

        Raises:
            ValueError: The own parts are private, and ``clients`` is None or does not sum to 1.
        """
        if self.own is not None and self.own.private:
            total = torch.zeros(1) if clients is None else clients.sum(dim=-1)
            if not torch.allclose(total, torch.ones_like(total), atol=1e-5):
                raise ValueError(
                    "parts of these adapters are private to the clients, so that only clients "
                    "have whole adapters; merge them with clients' shares that sum to 1 "
                    "(clients= of AdapterSoup.merge)"
                )
        merged = mix(weights, self.rows)
        if self.blocks is not None and clients is not None:
            self.blocks.add(merged, self.rows, clients)
        if self.own is not None and clients is not None:
            merged[..., self.own.columns] += clients.to(self.own.residuals) @ self.own.residuals
        return merged

    def with_rows(self, rows: Iterable[Tensor], count: int) -> AdapterSoup:
        """Return a copy of this soup with ``count`` new rows ``(P,)``, stored as in ``storage``."""
        return replace(self, rows=self.storage.store(rows, count))

    def state_dict(self, row: Tensor) -> dict[str, Tensor]:
        """Return the adapter ``(P,)`` in PEFT's saved form, including the shared tensors."""
        return {**self.layout.state_dict(row), **self.shared}

    def save(self, path: Path) -> None:
        """Write a safetensors file with the layout and a SHA-256 sum in its metadata.

        Raises:
            RunError: The file cannot be written.
        """
        tensors = {
            "rows": self.rows,
            **{_SHARED + key: value for key, value in self.shared.items()},
            **{_BASE + key: value for key, value in self.base.items()},
            **{
                prefix + key: value
                for prefix, part in ((_OWN, self.own), (_BLOCKS, self.blocks))
                for key, value in (part.tensors() if part else {}).items()
            },
        }
        write_tensors(path, tensors, self.layout.to_json())

    @classmethod
    def load(cls, path: Path, *, as_stored: bool = False) -> AdapterSoup:
        """Read the output of ``save``.

        Float32 rows are memory-mapped. The check of the file reads all rows once; later, only the
        rows that are used are read.

        Args:
            path: File.
            as_stored: Keep the number format of the file's rows. Default: convert them to float32.

        Raises:
            RunError: The file is missing, damaged, or not a soup.
        """
        tensors, note = read_tensors(path)
        try:
            layout = AdapterLayout.from_json(note)
            shared, base, own, blocks = (
                {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                for prefix in (_SHARED, _BASE, _OWN, _BLOCKS)
            )
            parts = _own_parts(own, layout) if own else None
            _check_parts(tensors, shared, base, layout)
            rows = tensors["rows"] if as_stored else tensors["rows"].float()
            by_block = BlockWeights.from_tensors(blocks, layout, len(rows)) if blocks else None
            return cls(rows, layout, shared, base, parts, by_block)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise damaged(path, f"it is not a soup ({error})") from error


def _own_parts(tensors: Mapping[str, Tensor], layout: AdapterLayout) -> OwnParts:
    """Return the own parts of a file.

    Raises ``ValueError`` if they do not fit the layout, and ``KeyError`` if a tensor is missing.
    """
    columns, residuals = tensors["columns"], tensors["residuals"]
    if (
        columns.dtype != torch.int64
        or columns.ndim != 1
        or residuals.dtype != torch.float32
        or residuals.ndim != 2
        or residuals.shape[1:] != columns.shape
        or bool(((columns < 0) | (columns >= layout.size)).any())
    ):
        raise ValueError("its own parts do not fit its layout")
    return OwnParts(columns, residuals, bool(tensors.get("private", False)))


def _check_parts(
    tensors: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    layout: AdapterLayout,
) -> None:
    """Raise ``ValueError`` if a file's rows, shared tensors or backbone updates are invalid."""
    formats = (torch.float32, torch.bfloat16)
    if tensors["rows"].dtype not in formats or len(tensors["rows"]) == 0:
        raise ValueError("its rows are neither float32 nor bfloat16, or there are none")
    if twice := shared.keys() & {entry.key for entry in layout.entries}:
        raise ValueError(f"{min(twice)} is both shared and part of a row")
    if any(update.ndim != 2 or not update.is_floating_point() for update in base.values()):
        raise ValueError("an update of the backbone is not a matrix of floats")

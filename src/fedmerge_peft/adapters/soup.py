"""The model soup: d adapters on one backbone, as a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.errors import RunError
from fedmerge_peft.util.files import write_tensors

_SHARED = "shared."
_BASE = "base."


@dataclass
class AdapterSoup:
    """Θ: d adapters, one a row.

    Merging is ``π @ Θ``: the paper's θ_i = Σ_j π_ij Θ_j (arXiv 2504.06768), which averages LoRA's A and B
    each. ``fedmerge_peft.merge_error`` tells how far that is from averaging the products B A.
    """

    rows: Tensor
    """``(d, P)``, float32."""
    layout: AdapterLayout
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen tensors that every adapter has in common (LoRA's A with ``merge: shared_a``), by PEFT's saved name."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """What the backbone's own weights have gained beside the adapters: ΔW ``(out, in)`` by module name. ``merge`` and ``state_dict`` leave
    it out; ``Backbone.set_base`` or ``merging.with_base`` take it in."""

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != self.layout.size:
            raise ValueError(
                f"a soup of this layout has shape (d, {self.layout.size}), got {tuple(self.rows.shape)}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def merge(self, weights: Tensor) -> Tensor:
        """Merged adapters: ``(d,)`` weights give a row ``(P,)``, ``(k, d)`` weights give ``(k, P)``."""
        return weights.to(self.rows) @ self.rows

    def state_dict(self, row: Tensor) -> dict[str, Tensor]:
        """One adapter in PEFT's saved form, with the tensors it shares with the others."""
        return {**self.layout.state_dict(row), **self.shared}

    def save(self, path: Path) -> None:
        """Write one safetensors file; the layout goes into its metadata. Raises ``RunError``."""
        tensors = {
            "rows": self.rows,
            **{_SHARED + key: value for key, value in self.shared.items()},
            **{_BASE + key: value for key, value in self.base.items()},
        }
        write_tensors(path, tensors, ("layout", self.layout.to_json()))

    @classmethod
    def load(cls, path: Path) -> AdapterSoup:
        """Read what ``save`` wrote. Raises ``RunError`` where the file is missing or is not a soup."""
        try:
            with safe_open(path, framework="pt") as file:
                layout = AdapterLayout.from_json((file.metadata() or {})["layout"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            shared, base = (
                {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                for prefix in (_SHARED, _BASE)
            )
            return cls(tensors["rows"], layout, shared, base)
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise RunError(f"{path}: not a readable soup ({error})") from error

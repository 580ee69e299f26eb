"""Model soup: a matrix of d adapters on one backbone."""

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
    """Θ: d adapters, one per row.

    Merging is ``π @ Θ``, the paper's θ_i = Σ_j π_ij Θ_j (arXiv 2504.06768). It averages LoRA's A
    and B separately. ``fedmerge_peft.merge_error`` measures the distance to the average of the
    products B A.
    """

    rows: Tensor
    """``(d, P)``, float32."""
    layout: AdapterLayout
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen tensors that all adapters share, by PEFT's saved name: A with ``merge: shared_a``."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """Updates ΔW ``(out, in)`` of the backbone's own weights, by module name.

    ``merge`` and ``state_dict`` ignore them. ``Backbone.set_base`` and
    ``exact_merge.add_base_update`` apply them.
    """

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape[1] != self.layout.size:
            raise ValueError(
                f"a soup of this layout has shape (d, {self.layout.size}), "
                f"got {tuple(self.rows.shape)}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def merge(self, weights: Tensor) -> Tensor:
        """Merge adapters with weights ``(d,)`` or ``(k, d)`` into rows ``(P,)`` or ``(k, P)``."""
        return weights.to(self.rows) @ self.rows

    def state_dict(self, row: Tensor) -> dict[str, Tensor]:
        """Return the adapter ``(P,)`` in PEFT's saved form, including the shared tensors."""
        return {**self.layout.state_dict(row), **self.shared}

    def save(self, path: Path) -> None:
        """Write one safetensors file with the layout in its metadata. Raise ``RunError``."""
        tensors = {
            "rows": self.rows,
            **{_SHARED + key: value for key, value in self.shared.items()},
            **{_BASE + key: value for key, value in self.base.items()},
        }
        write_tensors(path, tensors, ("layout", self.layout.to_json()))

    @classmethod
    def load(cls, path: Path) -> AdapterSoup:
        """Read the output of ``save``.

        Raises:
            RunError: The file is missing, unreadable, or not a soup.
        """
        try:
            with safe_open(path, framework="pt") as file:
                layout = AdapterLayout.from_json((file.metadata() or {})["layout"])
                # safe_open is not a mapping.
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
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

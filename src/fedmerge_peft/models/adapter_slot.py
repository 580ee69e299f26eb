"""One adapter in the backbone's own slot, which training uses like an ``AdapterStack`` of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from fedmerge_peft.models.backbone import Backbone


class AdapterSlot:
    """Adapter in the slot of the backbone, applied by plain PEFT.

    Args:
        backbone: Model. The adapter is loaded into its slot.
        row: Adapter, ``(P,)``.
    """

    def __init__(self, backbone: Backbone, row: Tensor) -> None:
        gradient = backbone.flat.grad
        assert gradient is not None  # noqa: S101 (allocated once by the backbone)
        backbone.load_row(row.to(backbone.device))
        gradient.zero_()  # an interrupted client may have left a gradient
        self.model = backbone.model
        self.rows = backbone.flat.data[None]
        """``(1, P)``, a view of the slot."""
        self.gradient = gradient[None]
        """``(1, P)``. Backward passes accumulate gradients here."""

    def __len__(self) -> int:
        """Return 1."""
        return 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Do nothing, because forward passes always use the slot."""
        yield

    def truncate(self, count: int) -> None:
        """Raise ``ValueError`` unless ``count`` is 1."""
        if count != 1:
            raise ValueError(f"a slot has one adapter and cannot be truncated to {count}")

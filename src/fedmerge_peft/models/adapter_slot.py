"""One adapter in the backbone's own slot, with the interface of ``AdapterStack`` for K = 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from fedmerge_peft.models.backbone import Backbone


class AdapterSlot:
    """The adapter that plain PEFT computes with.

    Args:
        backbone: The model; its slot holds the adapter from now on.
        row: The adapter, ``(P,)``.
    """

    def __init__(self, backbone: Backbone, row: Tensor) -> None:
        gradient = backbone.flat.grad
        assert gradient is not None  # noqa: S101 (allocated once by the backbone)
        backbone.load_row(row.to(backbone.device))
        gradient.zero_()  # an interrupted client may have left something
        self.model = backbone.model
        self.rows = backbone.flat.data[None]
        """``(1, P)``, a view of the slot."""
        self.gradient = gradient[None]
        """``(1, P)``: backward passes add the adapter's gradient here."""

    def __len__(self) -> int:
        return 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Do nothing: forward passes always run through the slot."""
        yield

    def truncate(self, count: int) -> None:
        """Raise ``ValueError`` for any count but 1."""
        if count != 1:
            raise ValueError(f"a slot holds one adapter, and {count} were to be kept")

"""Clients, and the table whose rows they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Client:
    """Who trains: a name and the rows it holds, as indices into the federation's table."""

    name: str
    train: Indices
    validation: Indices
    test: Indices
    group: str = ""
    """What the client has in common with others (a domain, a cluster); for reports, never for training."""

    @property
    def size(self) -> int:
        """Number of training examples: n_i in the paper's ρ_i = n_i / n."""
        return len(self.train)


@dataclass(frozen=True)
class FederatedData:
    """One table of rows, and the clients that hold them."""

    table: Dataset
    clients: Sequence[Client]

"""Clients and the table of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset

Indices = NDArray[np.int64]
"""Row numbers or class numbers, int64."""


@dataclass(frozen=True)
class Client:
    """Client with its rows, as indices into the federation's table."""

    name: str
    train: Indices
    validation: Indices
    test: Indices
    group: str = ""
    """Property shared with other clients, such as a domain; empty if there is none. Reports use it,
    training never does."""

    @property
    def size(self) -> int:
        """Number of training examples: n_i in the paper's ρ_i = n_i / n (arXiv 2504.06768)."""
        return len(self.train)


def rows_by_split(clients: Sequence[Client]) -> dict[str, Indices]:
    """Return the row numbers of all clients, by split: training, validation and test."""
    return {
        "training": np.concatenate([client.train for client in clients]),
        "validation": np.concatenate([client.validation for client in clients]),
        "test": np.concatenate([client.test for client in clients]),
    }


def held_parts(clients: Sequence[Client]) -> list[Indices]:
    """Return the training, validation and test rows of each client; empty parts are left out."""
    parts = (part for client in clients for part in (client.train, client.validation, client.test))
    return [part for part in parts if len(part)]


@dataclass(frozen=True)
class FederatedData:
    """Table of examples, and the clients to which its rows belong."""

    table: Dataset
    clients: Sequence[Client]

"""Mean update of each client over the rounds before the clients are grouped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.util.row_buffer import RowBuffer, as_matrix
from fedmerge_peft.util.stateful import State, Stateful, checked_copy, describe


class MeanUpdates(Stateful):
    """δ̄_i, the mean update of each client over the rounds in which it replied.

    The object stores one row ``(P,)`` for each client that has replied.
    """

    def __init__(self, context: StrategyContext) -> None:
        self._size = context.layout.size
        self._counts = torch.zeros(context.clients)
        self._squares = torch.zeros(context.clients, dtype=torch.float64)
        """Σ ‖δ_i‖² over the rounds, ``(m,)``."""
        self._sums: dict[int, Tensor] = {}
        self._buffer = RowBuffer(expected_calls=context.clients)

    def add(self, clients: Tensor, deltas: Tensor) -> None:
        """Add one round's updates ``(k, P)`` of these clients ``(k,)``."""
        self._counts[clients] += 1
        self._squares[clients] += torch.linalg.vector_norm(deltas, dim=1).double().square()
        for client, delta in zip(clients.tolist(), deltas, strict=True):
            if client in self._sums:
                self._sums[client] += delta
            else:
                self._sums[client] = self._buffer.append(delta)

    def replace(self, clients: Tensor, deltas: Tensor) -> None:
        """Replace all earlier updates of these clients ``(k,)`` by ``deltas`` ``(k, P)``."""
        for client in clients.tolist():
            if client in self._sums:
                self._sums[client].zero_()
        self._counts[clients] = 0
        self._squares[clients] = 0
        self.add(clients, deltas)

    @property
    def clients(self) -> Tensor:
        """Clients that have replied, ``(k,)`` int64, in ascending order."""
        return torch.nonzero(self._counts).flatten()

    def means(self) -> Tensor:
        """Compute δ̄ of the clients that have replied, ``(k, P)``."""
        rows, counts = RowBuffer(expected_calls=len(self._sums)), self._counts[self.clients]
        return as_matrix(
            [rows.append(row / count) for row, count in zip(self._ascending(), counts, strict=True)]
        )

    def repeatability(self) -> Tensor:
        """Compute the agreement of each client's updates over its rounds, ``(k,)`` float64.

        The agreement is the mean inner product of two updates of a client from different rounds,
        divided by the mean squared norm of the client's updates:
        (‖Σ δ‖² − Σ ‖δ‖²) / ((R − 1) Σ ‖δ‖²) for R rounds, and 0 for one round.
        """
        counts, squares = self._counts[self.clients].double(), self._squares[self.clients]
        sums = torch.stack(
            [torch.linalg.vector_norm(row).double().square() for row in self._ascending()]
        )
        return torch.where(
            (counts > 1) & (squares > 0),
            (sums - squares) / ((counts - 1).clamp_min(1) * squares.clamp_min(1e-300)),
            0.0,
        )

    def state_dict(self) -> State:
        return {"sums": self._rows(), "counts": self._counts, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        if state.keys() != {"sums", "counts", "squares"}:
            unmatched = sorted(state.keys() ^ {"sums", "counts", "squares"})
            raise ValueError(
                f"{', '.join(unmatched)}: present only in the state or only in the object"
            )
        sums, counts = state["sums"], checked_copy("counts", self._counts, state["counts"])
        clients = torch.nonzero(counts).flatten() if isinstance(counts, Tensor) else torch.empty(0)
        if (
            not isinstance(sums, Tensor)
            or sums.shape != (len(clients), self._size)
            or sums.dtype != torch.float32
        ):
            expected = f"a float32 tensor ({len(clients)}, {self._size})"
            raise ValueError(f"sums: expected {expected}, got {describe(sums)}")
        self._sums, self._buffer = {}, RowBuffer(expected_calls=len(self._counts))
        self.add(clients, sums)
        self._counts = counts if isinstance(counts, Tensor) else self._counts
        squares = checked_copy("squares", self._squares, state["squares"])
        self._squares = squares if isinstance(squares, Tensor) else self._squares

    def _ascending(self) -> list[Tensor]:
        return [self._sums[client] for client in sorted(self._sums)]

    def _rows(self) -> Tensor:
        return as_matrix(self._ascending()) if self._sums else torch.zeros(0, self._size)

"""What the clients' updates were over the rounds before clients are grouped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.util.row_buffer import RowBuffer, as_matrix
from fedmerge_peft.util.stateful import State, Stateful, checked_copy, describe


class MeanUpdates(Stateful):
    """δ̄_i: each client's mean update over the rounds in which it replied, whoever else did. Takes a row for each that has replied."""

    def __init__(self, context: StrategyContext) -> None:
        self._size = context.layout.size
        self._counts = torch.zeros(context.clients)
        self._sums: dict[int, Tensor] = {}
        self._buffer = RowBuffer(expected_calls=context.clients)

    def add(self, clients: Tensor, deltas: Tensor) -> None:
        """Remember one round's updates ``(k, P)`` of these clients ``(k,)``."""
        self._counts[clients] += 1
        for client, delta in zip(clients.tolist(), deltas, strict=True):
            if client in self._sums:
                self._sums[client] += delta
            else:
                self._sums[client] = self._buffer.append(delta)

    def put(self, clients: Tensor, deltas: Tensor) -> None:
        """Remember these updates in place of what these clients sent before."""
        for client in clients.tolist():
            if client in self._sums:
                self._sums[client].zero_()
        self._counts[clients] = 0
        self.add(clients, deltas)

    @property
    def clients(self) -> Tensor:
        """Who has replied, ``(k,)`` int64, ascending."""
        return torch.nonzero(self._counts).flatten()

    def means(self) -> Tensor:
        """δ̄ of those who have replied, ``(k, P)``."""
        kept, counts = RowBuffer(expected_calls=len(self._sums)), self._counts[self.clients]
        return as_matrix(
            [kept.append(row / count) for row, count in zip(self._ascending(), counts, strict=True)]
        )

    def state_dict(self) -> State:
        return {"sums": self._rows(), "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        if state.keys() != {"sums", "counts"}:
            raise ValueError(
                f"{', '.join(sorted(state.keys() ^ {'sums', 'counts'}))}: on one side only"
            )
        sums, counts = state["sums"], checked_copy("counts", self._counts, state["counts"])
        clients = torch.nonzero(counts).flatten() if isinstance(counts, Tensor) else torch.empty(0)
        if (
            not isinstance(sums, Tensor)
            or sums.shape != (len(clients), self._size)
            or sums.dtype != torch.float32
        ):
            raise ValueError(
                f"sums: {describe(sums)} does not fit where {len(clients)} rows of {self._size} numbers were expected"
            )
        self._sums, self._buffer = {}, RowBuffer(expected_calls=len(self._counts))
        self.add(clients, sums)
        self._counts = counts if isinstance(counts, Tensor) else self._counts

    def _ascending(self) -> list[Tensor]:
        return [self._sums[client] for client in sorted(self._sums)]

    def _rows(self) -> Tensor:
        return as_matrix(self._ascending()) if self._sums else torch.zeros(0, self._size)

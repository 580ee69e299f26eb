"""Assignments of one round, made lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import Plan, Served

T = TypeVar("T")


@dataclass(frozen=True)
class Assignment:
    """Plan, served model and hyperparameters of one client in a round."""

    plan: Plan
    served: Served | None = None
    """Adapter or mixture to be scored before any training; None to score nothing."""
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    """Values for the keys of ``training`` that are auto."""
    validated: bool = False
    """True to report the loss on the client's validation examples before and after training."""


class Assignments(Generic[T]):
    """Iterable of pairs (client, assignment), created lazily during the iteration.

    Assignments contain adapters, so thousands of them should not be in memory at the same time. An
    engine can create only the assignments that it needs.
    """

    def __init__(self, clients: Sequence[int], make: Callable[[int], T]) -> None:
        """Store indices and ``make(client)``, whose result must be the same for each call."""
        self.clients = clients
        self.make = make

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, T]]) -> Assignments[T]:
        """Wrap existing pairs; all of them stay in memory."""
        if isinstance(pairs, Assignments):
            return pairs
        held = dict(pairs)
        return cls(list(held), held.__getitem__)

    def __iter__(self) -> Iterator[tuple[int, T]]:
        return ((client, self.make(client)) for client in self.clients)

"""Assignments of one round, made lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fedmerge_peft.training.plan import Plan, Served

T = TypeVar("T")


@dataclass(frozen=True)
class Assignment:
    """One client's part in a round."""

    plan: Plan
    served: Served | None = None
    """Adapter or mixture to be scored before any training; None to score nothing."""


class Assignments(Generic[T]):
    """Pairs (client, what it is sent), made while they are iterated over.

    They hold adapters, of which memory should not hold thousands at a time. An engine that needs
    only some of them makes only these.
    """

    def __init__(self, clients: Sequence[int], make: Callable[[int], T]) -> None:
        """Take the clients' indices and ``make(client)``, which returns the same at each call."""
        self.clients = clients
        self.make = make

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, T]]) -> Assignments[T]:
        """Wrap pairs that come in any other way; holds all of them."""
        if isinstance(pairs, Assignments):
            return pairs
        held = dict(pairs)
        return cls(list(held), held.__getitem__)

    def __iter__(self) -> Iterator[tuple[int, T]]:
        return ((client, self.make(client)) for client in self.clients)

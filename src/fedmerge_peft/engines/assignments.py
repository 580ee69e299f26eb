"""Assignments of the clients in one round, created lazily."""

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
    """Adapter or mixture to score before training; None to score nothing."""
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    """Values for the keys of the section ``training`` that are set to ``auto``."""
    validated: bool = False
    """True to report the losses on the client's validation examples (``Reply.validation``)."""


class Assignments(Generic[T]):
    """Iterable of pairs (client index, value), created lazily during the iteration.

    The values are an ``Assignment`` or a served model for each client. They contain adapters, so
    thousands of them should not be in memory at the same time. Lazy creation also lets an engine
    create only the values that it needs.
    """

    def __init__(self, clients: Sequence[int], make: Callable[[int], T]) -> None:
        """Store client indices, and ``make``, which returns the value of a client.

        ``make`` may be called several times for a client, and must then return equal values.
        """
        self.clients = clients
        self.make = make

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, T]]) -> Assignments[T]:
        """Wrap pairs in memory; return an existing ``Assignments`` unchanged."""
        if isinstance(pairs, Assignments):
            return pairs
        held = dict(pairs)
        return cls(list(held), held.__getitem__)

    def __iter__(self) -> Iterator[tuple[int, T]]:
        return ((client, self.make(client)) for client in self.clients)

"""What clients are sent, made when it is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

V = TypeVar("V", bound=tuple[int, *tuple[Any, ...]])


class Assignments(Generic[V]):
    """For each of several clients, its index and what it is sent: adapters, which no memory should hold for thousands of clients.

    Iterating makes them one by one. Who needs some of them only knows whose they are beforehand.
    """

    def __init__(self, clients: Sequence[int], make: Callable[[int], V]) -> None:
        """``make(client)`` may be called more than once, with the same result."""
        self.clients = clients
        self.make = make

    @classmethod
    def of(cls, visits: Iterable[V]) -> Assignments[V]:
        """Visits that come in any other way; held, all of them."""
        if isinstance(visits, Assignments):
            return visits
        held = {visit[0]: visit for visit in visits}
        return cls(list(held), held.__getitem__)

    def __iter__(self) -> Iterator[V]:
        return map(self.make, self.clients)

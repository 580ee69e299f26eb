"""Base class of strategies that change what another strategy sends or serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.base import Reply, Strategy
from fedmerge_peft.training.plan import Plan


class WrappedStrategy(Strategy):
    """Strategy that delegates to ``inner``.

    A subclass must define ``soup``. ``adapter`` and ``served`` are not delegated: by default, they
    merge the rows of this soup with the weights of ``inner``.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("inner",)

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.learns_weights = inner.learns_weights
        self.trains_what_it_serves = inner.trains_what_it_serves
        self.averages = inner.averages

    @property
    def aggregator(self) -> Aggregator:
        return self.inner.aggregator

    @aggregator.setter
    def aggregator(self, aggregator: Aggregator) -> None:
        self.inner.aggregator = aggregator

    @property
    def base(self) -> Mapping[str, Tensor]:
        return self.inner.base

    @property
    def weights(self) -> Tensor:
        return self.inner.weights

    def plan(self, client: int) -> Plan:
        return self.inner.plan(client)

    def update(self, replies: Iterable[Reply]) -> None:
        self.inner.update(replies)

    def traffic(self, client: int) -> tuple[int, int]:
        return self.inner.traffic(client)

    def gap(self, reply: Reply, trained: Tensor) -> float:
        return self.inner.gap(reply, trained)

    def resize(self, adapters: int) -> None:
        self.inner.resize(adapters)

    def validates(self) -> bool:
        return self.inner.validates()

    def decisions(self) -> list[str]:
        return self.inner.decisions()

    def warnings(self) -> list[str]:
        return self.inner.warnings()

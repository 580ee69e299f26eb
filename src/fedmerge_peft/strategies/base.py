"""Interface of a server-side method, which plans the clients' work and learns from the replies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.adapters import merging_weights
from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.training.plan import Plan, Served, Train
from fedmerge_peft.util.row_buffer import as_matrix
from fedmerge_peft.util.stateful import Stateful


@dataclass(frozen=True)
class StrategyContext:
    """Inputs from which a strategy is constructed, in addition to its recipe."""

    clients: int
    """m, the number of clients in the federation."""
    layout: AdapterLayout
    fresh_row: Callable[[int], Tensor]
    """``fresh_row(k)`` returns the k-th random adapter ``(P,)``, always the same for the same k."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen tensors that all adapters share, by the name under which PEFT saves them."""
    seed: int = 0
    scaling: Mapping[str, float] = field(default_factory=dict)
    """Factor by which each adapted layer scales its update B A, by module name: alpha / r, or
    alpha / √r with rsLoRA."""
    aggregator: Aggregator = field(default_factory=Aggregator)
    label_counts: Tensor | None = None
    """Training examples of each client by label, ``(m, classes)`` int64. None if examples have no
    labels, or if the recipe asks for differential privacy."""
    validation: bool = True
    """True if clients can report losses on validation examples: some clients have validation
    examples, and the recipe does not ask for differential privacy."""
    folder: Path | None = None
    """Folder for temporary files of the server. Default: ``TMPDIR``."""


@dataclass(frozen=True)
class Reply:
    """One client's reply in one round."""

    client: int
    """Index of the client in the federation."""
    deltas: Tensor
    """Adapters as sent minus adapters as trained, ``(k, P)`` float32 on the CPU: one row for each
    adapter that the plan trains."""
    size: int
    """n_i, the number of training examples; 1 if ``privacy.mode: local`` hides it."""
    train_loss: float | None
    """Mean loss (nats) of the first trained adapter over its training steps. For a mixture, the sum
    of the components' mean losses, in which each example has its posterior weight. None from a
    private site, which sends no losses and no scores (``sites/site/release.py``)."""
    seconds: float
    """Duration of the client's work. If the trained adapter was cached, the duration of its
    original training counts instead. 0 from a private site."""
    served: dict[str, float] | None = None
    """Scores of the adapter that the client was served, before training, such as ``test_accuracy``.
    None in rounds without evaluation, and from a private site."""
    finetuned: dict[str, float] | None = None
    """Scores after local training. None if ``served`` is None, or if the recipe sets
    ``evaluation.finetuned: false``."""
    choice: int = 0
    """Index of the trained adapter, if the plan offered a choice."""
    weights: Tensor | None = None
    """New π ``(d,)``, if the plan was a mixture."""
    round: int | None = None
    """Round of the plan, from 1. If None, the server does not check that the reply belongs to the
    current round."""
    statistics: Tensor | None = None
    """Class statistics ``(rows, classes, d + 2)`` of the adapters that the plan measures
    (``features.class_statistics``); None if it measures none."""
    validation: tuple[float, ...] | None = None
    """Mean losses (nats) on the validation examples: before local training, after it, and with the
    adapter that the plan compares, if any. Reported in rounds in which ``Strategy.validates`` is
    True; None without validation examples, and from a private site."""

    @property
    def delta(self) -> Tensor:
        """Update δ_i = θ_i(sent) − θ_i(trained) of the first trained adapter, ``(P,)``."""
        return self.deltas[0]


class Strategy(Stateful, ABC):
    """Server-side method that runs on the common round loop.

    Every strategy serves client i with ``weights[i] @ soup``. If the soup has own parts, those of
    the client are added; if it has weights by block, the weights differ between blocks of columns.
    One global adapter is a soup with one row. A clustering has one-hot weights. Purely local
    training is a soup with one row for each client. A mixture of experts uses the same weights to
    mix the predictions of the adapters. Adapters that stay private to a client in a real federation
    are rows of the soup as well, and private parts of adapters are its own parts; ``traffic``
    counts neither.

    A client that has not taken part yet (``clients.fraction`` below 1) is served like a new client:
    with the global adapter if there is one, and with the mean of all adapters otherwise (for a
    mixture, with the mean of the predictions). Private parts never leave their client. A client
    that has no private parts yet therefore uses the corresponding parts of the global adapter. If
    the global adapter lacks these parts, as in FedRep, the client uses the initial parts.

    A strategy resumes after an interruption from its soup and its ``state_fields``.
    """

    learns_weights: bool = False
    """True if π depends on the replies, so that its entropy and the adapter masses are
    informative."""
    trains_what_it_serves: bool = True
    """True if local training starts from the adapter that the client is served.

    The row of a ``Train`` plan is then the served adapter. If False, scores before and after
    training are not comparable.
    """

    averages: bool = True
    """True if the server computes all shared parameters from means of updates. An ``Aggregator``
    can replace these means by a robust rule."""

    adapters_per_client: ClassVar[int] = 0
    """Number of adapters that the server keeps in memory for each client."""

    soup: AdapterSoup
    aggregator: Aggregator
    """Rule that combines updates. ``make_strategy`` sets it."""

    @property
    def base(self) -> Mapping[str, Tensor]:
        """ΔW ``(out, in)``, added to the backbone's weights for all clients, by module name."""
        return self.soup.base

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """π, ``(clients, adapters)``; rows sum to 1."""

    @abstractmethod
    def update(self, replies: Iterable[Reply]) -> None:
        """Update the soup and the weights from one round's replies, in place."""

    def plan(self, client: int) -> Plan:
        """Return the client's plan for the next round. Default: train the served adapter."""
        return Train(self.adapter(client))

    def served(self, client: int) -> Served:
        """Return the model with which the client predicts."""
        return self.adapter(client)

    def validates(self) -> bool:
        """Return True if the strategy needs validation losses in the replies of the next round."""
        return False

    def traffic(self, client: int) -> tuple[int, int]:
        """Return how many values the client receives and returns in the next round."""
        return self.soup.layout.size, self.soup.layout.size

    def trained_rows(self, plan: Plan, reply: Reply) -> Tensor:
        """Return the shared adapters as the client trained them, ``(k, P)``."""
        sent = plan.sent[plan.shared_rows(reply.choice)]
        return sent - reply.deltas[: len(sent)]

    def gap(self, reply: Reply, trained: Tensor) -> float:
        """Compute the local-global gap ‖θ_i(trained) − θ_i(sent next)‖₂ (arXiv 2504.06768).

        If the client shares several adapters, the gap is the mean over them. Call this after
        ``update``.

        Args:
            reply: The client's reply.
            trained: Result of ``trained_rows`` before ``update``, ``(k, P)``.
        """
        plan = self.plan(reply.client)
        return float((trained - plan.sent[plan.shared_rows(reply.choice)]).norm(dim=1).mean())

    def resize(self, adapters: int) -> None:
        """Change the number of adapters before a saved state with this number is loaded.

        Raises:
            ValueError: The strategy's number of adapters is fixed.
        """
        raise ValueError(f"the number of its adapters is {adapters}, expected {len(self.soup)}")

    def decisions(self) -> list[str]:
        """Return the decisions of the last ``update``, such as the number of groups.

        Each decision is one sentence.
        """
        return []

    def warnings(self) -> list[str]:
        """Return warnings about the current state, such as unused adapters, one sentence each."""
        return merging_weights.weight_warnings(self.weights) if self.learns_weights else []

    def adapter(self, client: int) -> Tensor:
        """Return the client's merged adapter π_i Θ, ``(P,)``."""
        return self.soup.merge(self.weights[client])


def stack_replies(replies: Iterable[Reply]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack replies in ascending order of their clients.

    The order makes floating-point sums independent of the order of arrival. The deltas are not
    copied if they are adjacent in memory.

    Returns:
        Client indices ``(k,)`` int64, first deltas ``(k, P)`` float32, and sizes ``(k,)`` float64.
    """
    ordered = sorted(replies, key=lambda reply: reply.client)
    return (
        torch.tensor([reply.client for reply in ordered]),
        as_matrix([reply.delta for reply in ordered]),
        torch.tensor([reply.size for reply in ordered], dtype=torch.float64),
    )

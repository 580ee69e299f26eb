"""What a server-side method is: what each client gets, and what the replies change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
    """What a strategy starts from: who the clients are, and where new adapters come from."""

    clients: int
    """m, the number of clients in the federation."""
    layout: AdapterLayout
    fresh_row: Callable[[int], Tensor]
    """``fresh_row(k)``: the k-th random adapter ``(P,)``; the same k gives the same numbers."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Frozen tensors that all adapters have in common, by PEFT's saved name."""
    seed: int = 0
    scaling: Mapping[str, float] = field(default_factory=dict)
    """What the update B A of each adapted layer is multiplied by, by module name: alpha / r, or alpha / √r with rsLoRA."""
    aggregator: Aggregator = field(default_factory=Aggregator)


@dataclass(frozen=True)
class Reply:
    """What comes back from one client after one round."""

    client: int
    """Index of the client in the federation."""
    deltas: Tensor
    """As sent minus as trained, ``(k, P)`` float32 on the CPU: a row for each adapter that the plan had it train."""
    size: int
    """n_i, training examples."""
    train_loss: float
    """Mean loss over the round's training steps."""
    seconds: float
    served: dict[str, float] | None = None
    """Scores of what the client was served with before the round, such as ``test_accuracy``; None in rounds that do not measure."""
    finetuned: dict[str, float] | None = None
    """Scores after local training."""
    choice: int = 0
    """Which adapter was trained, where the plan gave a choice."""
    weights: Tensor | None = None
    """The mixture's new π ``(d,)``, where the plan was a mixture."""
    round: int | None = None
    """The round whose plan it answers, from 1; None where whoever hands it over vouches for it."""

    @property
    def delta(self) -> Tensor:
        """δ_i = θ_i(sent) − θ_i(trained), ``(P,)``, of the first adapter (mostly the only one)."""
        return self.deltas[0]


class Strategy(Stateful, ABC):
    """A server-side method on one round loop.

    Whatever the method, a client is served with ``weights[client] @ soup``: one global adapter is a soup of one, a
    clustering has one-hot weights, and purely local training is a soup with an adapter for each client. (A mixture of
    experts mixes what the adapters predict, by the same weights.) What stays private to a client in the real world is a row
    of the soup too, and ``traffic`` leaves it out.

    A client that has not been asked yet (``clients.fraction`` below 1) is served with what a new client would get, for which
    nothing is known about it: the global adapter, where there is one; else the mean of the adapters (of a mixture's components,
    what they predict). What is private never leaves its client, so a client that has nothing private yet takes the global
    adapter's part, or, where no such part is global, as in FedRep, the part of the start.

    What a strategy needs to go on after an interruption is its soup and what it ``remembers``.
    """

    learns_weights: ClassVar[bool] = False
    """Whether π changes with the replies, so that its entropy and the adapters' mass say something."""
    trains_what_it_serves: ClassVar[bool] = True
    """Whether local training starts from what the client is served with; where not, scores before and after do not compare.

    Where it does, and a plan is ``Train``, the plan's row is what the client is served with.
    """

    averages: ClassVar[bool] = True
    """Whether what is shared is made of means of updates, which an ``Aggregator`` can make robust."""

    soup: AdapterSoup
    aggregator: Aggregator
    """What makes one update of several; ``make_strategy`` sets it."""

    @property
    def base(self) -> Mapping[str, Tensor]:
        """What the strategy has added to the backbone's own weights, for all clients: ΔW ``(out, in)`` by module name."""
        return self.soup.base

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """π, ``(clients, adapters)``; rows sum to 1."""

    @abstractmethod
    def update(self, replies: Iterable[Reply]) -> None:
        """Learn from one round's replies."""

    def plan(self, client: int) -> Plan:
        """What this client is asked to do in the next round: by default, to train the adapter that it is served with."""
        return Train(self.adapter(client))

    def served(self, client: int) -> Served:
        """What this client predicts with."""
        return self.adapter(client)

    def traffic(self, client: int) -> tuple[int, int]:
        """How many numbers travel to this client in a round, and back."""
        return self.soup.layout.size, self.soup.layout.size

    def trained_rows(self, plan: Plan, reply: Reply) -> Tensor:
        """What a client made of the adapters that are shared, ``(k, P)``."""
        sent = plan.sent[plan.shared_rows(reply.choice)]
        return sent - reply.deltas[: len(sent)]

    def gap(self, reply: Reply, trained: Tensor) -> float:
        """The paper's local-global gap in parameters: ‖θ_i(trained) − θ_i(sent next)‖₂ of the adapter that is shared.

        The mean over them, where several are. To be asked after ``update``, with what ``trained_rows`` said before it.
        """
        plan = self.plan(reply.client)
        return float((trained - plan.sent[plan.shared_rows(reply.choice)]).norm(dim=1).mean())

    def warnings(self) -> list[str]:
        """What a person should know about the weights as they are now."""
        return merging_weights.weight_warnings(self.weights) if self.learns_weights else []

    def adapter(self, client: int) -> Tensor:
        """The client's merged adapter, ``(P,)``: π_i Θ."""
        return self.soup.merge(self.weights[client])


def stack(replies: Iterable[Reply]) -> tuple[Tensor, Tensor, Tensor]:
    """Who replied ``(k,)``, their first deltas ``(k, P)`` and their sizes ``(k,)``, in the order of the clients.

    Sorted, so that floating-point sums do not depend on which client was quicker. The matrix is no copy where the deltas lie side by side.
    """
    ordered = sorted(replies, key=lambda reply: reply.client)
    return (
        torch.tensor([reply.client for reply in ordered]),
        as_matrix([reply.delta for reply in ordered]),
        torch.tensor([reply.size for reply in ordered], dtype=torch.float64),
    )

"""Clients with made data and a small model, to measure attacks in seconds.

Inputs are noisy prototypes of a topic. Each group of clients names the topics in its own way, as
the organizations of the quickstart do: label = permutation of its group (topic). The model is

    logits = V relu((W + B A) x),

with a fixed random W ``(H, D)``. The adapter holds A ``(r, D)``, B ``(H, r)`` and the head V
``(C, H)``. All clients of a round are trained in one batch, by SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fedmerge_peft import AdapterLayout
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.strategies import Reply, StrategyContext
from fedmerge_peft.testing import FormulaClients
from fedmerge_peft.util.seeds import derive

INPUTS, HIDDEN, RANK, CLASSES = 24, 32, 4, 6
TRAIN, TEST = 30, 100
"""Examples of each client."""
NOISE = 0.25
"""Standard deviation of the noise of each input; prototypes have length 1."""
STEPS, BATCH, RATE = 6, 10, 0.3
"""Local training: steps, examples of a step, and learning rate of SGD."""
TARGET = 0
"""Label that the trigger of a backdoor asks for."""
LAYOUT = AdapterLayout.from_tensors(
    [
        ("layer.lora_A.weight", (RANK, INPUTS), "lora"),
        ("layer.lora_B.weight", (HIDDEN, RANK), "lora"),
        ("head.weight", (CLASSES, HIDDEN), "head"),
    ]
)

Send = Callable[[int, Tensor, torch.Generator], Tensor]
"""``send(round, deltas, generator)`` returns the updates that colluders send, given their own,
``(a, P)``."""


class MadeClients(FormulaClients):
    """Clients of several groups.

    Args:
        groups: Number of clients of each group.
        seed: Seed of data, model and training.
    """

    def __init__(self, groups: Sequence[int], seed: int) -> None:
        super().__init__(sum(groups), LAYOUT, [TRAIN] * sum(groups))
        self.seed = seed
        draws = torch.Generator().manual_seed(derive(seed, "made data"))
        self.group = torch.tensor([g for g, count in enumerate(groups) for _ in range(count)])
        """Group of each client, ``(m,)``."""
        self.names = torch.stack([torch.randperm(CLASSES, generator=draws) for _ in groups])
        """Label of each topic in each group, ``(groups, C)``."""
        prototypes = torch.randn(CLASSES, INPUTS, generator=draws)
        prototypes = torch.nn.functional.normalize(prototypes, dim=1)
        self.trigger = torch.nn.functional.normalize(torch.randn(INPUTS, generator=draws), dim=0)
        """Vector that a backdoor adds to inputs, ``(D,)``."""
        shape = (len(self.group), TRAIN + TEST)
        self.topics = torch.randint(CLASSES, shape, generator=draws)
        noise = torch.randn(*shape, INPUTS, generator=draws)
        self.prototypes = prototypes
        self.inputs = prototypes[self.topics] + NOISE * noise
        self.labels = torch.stack(
            [self.names[g][topics] for g, topics in zip(self.group, self.topics, strict=True)]
        )
        self.frozen = torch.randn(HIDDEN, INPUTS, generator=draws)
        self.hostile: list[int] = []
        self.send: Send | None = None
        """Updates of the hostile clients, instead of their own."""

    def fresh_row(self, number: int) -> Tensor:
        """Return the ``number``-th random adapter ``(P,)``, with B = 0."""
        draws = torch.Generator().manual_seed(derive(self.seed, "adapter", number))
        row = torch.randn(LAYOUT.size, generator=draws) / HIDDEN**0.5
        row[LAYOUT.entries[1].columns] = 0
        return row

    def strategy_context(self) -> StrategyContext:
        """Return the inputs of a strategy."""
        return StrategyContext(
            len(self.group), LAYOUT, self.fresh_row, seed=self.seed, scaling={"layer": 1.0}
        )

    def logits(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Return logits ``(k, n, C)`` of adapters ``(k, P)`` for inputs ``(k, n, D)``."""
        a, b, head = (
            rows[:, entry.columns].view(len(rows), *entry.shape) for entry in LAYOUT.entries
        )
        return torch.relu(inputs @ (self.frozen + b @ a).mT) @ head.mT

    def train_all(self, number: int, clients: Sequence[int], rows: Tensor) -> Tensor:
        """Train adapters ``(k, P)`` of clients in a round; return the new ones."""
        draws = torch.Generator().manual_seed(derive(self.seed, "training", number))
        epochs = [
            torch.rand(len(self.group), TRAIN, generator=draws).argsort(dim=1)
            for _ in range(STEPS * BATCH // TRAIN)
        ]
        chosen = torch.tensor(clients)[:, None]
        for batch in torch.cat(epochs, dim=1)[clients].split(BATCH, dim=1):
            rows = self.step(rows, self.inputs[chosen, batch], self.labels[chosen, batch])
        return rows

    def step(self, rows: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return adapters ``(k, P)`` after a step on inputs ``(k, n, D)`` and labels ``(k, n)``."""
        rows = rows.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            self.logits(rows, inputs).flatten(0, 1), labels.flatten(), reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss / BATCH, rows)
        return rows.detach() - RATE * gradient

    def server_updates(self, rows: Tensor) -> Tensor:
        """Return the updates of adapters ``(d, P)`` from a few examples that the server has.

        The server does not know groups: the label of an example is that of a random client.
        """
        draws = torch.Generator().manual_seed(derive(self.seed, "server's data"))
        topics = torch.randint(CLASSES, (STEPS, BATCH), generator=draws)
        clients = torch.randint(len(self.group), (STEPS, BATCH), generator=draws)
        labels = self.names[self.group[clients], topics]
        noise = torch.randn(STEPS, BATCH, INPUTS, generator=draws)
        trained = rows
        for inputs, own in zip(self.prototypes[topics] + NOISE * noise, labels, strict=True):
            count = len(rows)
            trained = self.step(trained, inputs.expand(count, -1, -1), own.expand(count, -1))
        return rows - trained

    def accuracies(self, rows: Tensor) -> Tensor:
        """Return each client's accuracy on its test examples ``(m,)`` with adapters ``(m, P)``."""
        found = self.logits(rows, self.inputs[:, TRAIN:]).argmax(dim=2)
        return (found == self.labels[:, TRAIN:]).float().mean(dim=1)

    def trigger_rates(self, rows: Tensor) -> Tensor:
        """Return the share of each client's inputs that get the target with the trigger, ``(m,)``.

        Inputs whose label is the target do not count.
        """
        found = self.logits(rows, self.inputs[:, TRAIN:] + self.trigger).argmax(dim=2)
        others = self.labels[:, TRAIN:] != TARGET
        return ((found == TARGET) & others).sum(dim=1) / others.sum(dim=1)

    def engine(self) -> Engine:
        """Return an engine that trains all clients of a round in one batch."""
        engine = cast("Any", super().engine())

        def train_clients(number: int, assignments: Iterable[Any]) -> Iterator[Any]:
            pairs = list(assignments)
            clients = [client for client, _ in pairs]
            sent = torch.stack([assignment.plan.row for _, assignment in pairs])
            deltas = sent - self.train_all(number, clients, sent)
            if self.send is not None and self.hostile:
                draws = torch.Generator().manual_seed(derive(self.seed, "attack", number))
                places = [clients.index(client) for client in self.hostile]
                deltas[places] = self.send(number, deltas[places], draws)
            for (client, assignment), delta in zip(pairs, deltas, strict=True):
                yield assignment.plan, Reply(client, delta[None], TRAIN, 1.0, 0.0)

        engine.train_clients = train_clients
        return cast("Engine", engine)

"""Attacks of hostile clients: functions from an honest reply to the replies that are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.strategies import Reply
from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.util.seeds import derive


@dataclass
class Adversary:
    """Knowledge of one hostile client."""

    seed: int
    victim: int
    """An honest client whose identity it can use."""
    victims_size: int
    first: Reply | None = field(default=None)
    """The first honest reply of the hostile client."""


def sign_flip(reply: Reply, _: Adversary) -> list[Reply]:
    """Send −δ, to make the model worse on the client's data."""
    return [replace(reply, deltas=-reply.deltas)]


def times_100(reply: Reply, _: Adversary) -> list[Reply]:
    """Send 100 δ, to replace the model (Bagdasaryan et al. 2020, arXiv 1807.00459)."""
    return [replace(reply, deltas=100 * reply.deltas)]


def noise(reply: Reply, adversary: Adversary) -> list[Reply]:
    """Send Gaussian noise with ten times the norm of δ."""
    generator = torch.Generator().manual_seed(
        derive(adversary.seed, "noise", reply.client, reply.round or 0)
    )
    drawn = torch.randn(reply.deltas.shape, generator=generator)
    return [replace(reply, deltas=10 * reply.deltas.norm() / drawn.norm() * drawn)]


def nan(reply: Reply, _: Adversary) -> list[Reply]:
    """Send δ with one NaN."""
    return [replace(reply, deltas=reply.deltas.index_fill(1, torch.tensor([0]), torch.nan))]


def stale(reply: Reply, adversary: Adversary) -> list[Reply]:
    """Send the first reply in every round, with the number of the current round."""
    adversary.first = adversary.first or reply
    return [replace(reply, deltas=adversary.first.deltas)]


def duplicate(reply: Reply, adversary: Adversary) -> list[Reply]:
    """Send the own reply, and −10 δ in the name of an honest client."""
    return [
        reply,
        replace(
            reply, client=adversary.victim, size=adversary.victims_size, deltas=-10 * reply.deltas
        ),
    ]


def label_flip(reply: Reply, _: Adversary) -> list[Reply]:
    """Send the result of training on reversed labels; ``flipped`` reverses them in the data."""
    return [reply]


def absent(reply: Reply, _: Adversary) -> list[Reply]:
    """Send nothing: the loss without the hostile clients' help, which no defense recovers."""
    return []


Attack = Callable[[Reply, Adversary], list[Reply]]
ATTACKS: dict[str, Attack] = {
    "sign flip": sign_flip,
    "x100": times_100,
    "noise": noise,
    "label flip": label_flip,
    "nan": nan,
    "stale": stale,
    "duplicate": duplicate,
    "absent": absent,
}


def attackers(clients: int, fraction: float, seed: int) -> list[int]:
    """Draw a fraction of the clients by the seed; at least one unless the fraction is 0."""
    count = max(1, round(fraction * clients)) if fraction else 0
    return sorted(
        int(client)
        for client in np.random.default_rng(derive(seed, "attackers")).choice(
            clients, count, replace=False
        )
    )


def attacked(engine: LocalEngine, attack: Attack, hostile: Iterable[int], seed: int) -> LocalEngine:
    """Return an engine with these hostile clients; it shares model and data with ``engine``."""
    hostile = list(hostile)
    changed = flipped(engine, hostile) if attack is label_flip else copy(engine)
    honest = [client for client in range(len(engine.clients)) if client not in hostile]
    victims = {client: honest[place % len(honest)] for place, client in enumerate(hostile)}
    known = {
        client: Adversary(seed, victim, engine.clients[victim].size)
        for client, victim in victims.items()
    }

    def train_clients(number: int, assignments: Any) -> Iterator[Any]:
        for plan, answer in LocalEngine.train_clients(changed, number, assignments):
            answers = [answer]
            if isinstance(answer, Reply) and answer.client in known:
                answers = list(attack(answer, known[answer.client]))
            yield from ((plan, each) for each in answers)

    changed.train_clients = train_clients  # type: ignore[method-assign]
    return changed


def flipped(engine: LocalEngine, hostile: Iterable[int]) -> LocalEngine:
    """Return an engine with reversed labels, y ← L − 1 − y, in these clients' training examples."""
    columns = engine.runtime.examples.columns
    labels = list(columns["labels"])
    for client in hostile:
        for row in engine.clients[client].train:
            labels[row] = len(engine.task.labels) - 1 - labels[row]
    changed = copy(engine)
    changed.runtime = replace(engine.runtime, examples=Examples({**columns, "labels": labels}))
    changed.clear_caches()  # their content depends on the labels
    return changed

"""Attacks of colluding clients: poisoned examples, and updates that are agreed on.

The colluders know their own honest updates, their adapters and the defense. They estimate the norm
bound, a median of all norms, by the median of their own. None declares a size of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from made_clients import TARGET, TRAIN, MadeClients, Send
from torch import Tensor
from torch.nn.functional import normalize

VICTIMS = 1
"""Group whose adapter a takeover aims at."""


@dataclass(frozen=True)
class Collusion:
    """An attack: what colluders send, and what they train on."""

    send: Send
    poison: Callable[[MadeClients], None] = lambda _: None


def bound(deltas: Tensor) -> Tensor:
    return deltas.norm(dim=1).median()


def identical(_round: int, deltas: Tensor, _draws: torch.Generator) -> Tensor:
    """Send one vector at the norm bound: the negative mean of the own updates."""
    return (-bound(deltas) * normalize(deltas.mean(dim=0, keepdim=True))).expand_as(deltas)


def alternating(number: int, deltas: Tensor, draws: torch.Generator) -> Tensor:
    """Send one vector in odd rounds and honest updates in even ones."""
    return identical(number, deltas, draws) if number % 2 else deltas


def adapted(_round: int, deltas: Tensor, draws: torch.Generator) -> Tensor:
    """Oppose the mean at the norm bound, with noise: as similar to each other as honest updates."""
    return _alike(-normalize(deltas.mean(dim=0, keepdim=True)), deltas, draws)


def sideways(_round: int, deltas: Tensor, draws: torch.Generator) -> Tensor:
    """Send a fixed direction that is orthogonal to the mean, with noise, at the norm bound.

    No vote opposes it, and the updates are no more similar to each other than honest ones.
    """
    mean = normalize(deltas.mean(dim=0, keepdim=True))
    fixed = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    return _alike(normalize(fixed - fixed @ mean.T * mean), deltas, draws)


def _alike(direction: Tensor, deltas: Tensor, draws: torch.Generator) -> Tensor:
    """Return C (√c u + √(1 − c) e_i), with c the mean cosine of the own updates.

    u is the direction ``(1, P)``, and e_i noise of length 1, orthogonal to it.
    """
    own = normalize(deltas)
    others = ~torch.eye(len(deltas), dtype=torch.bool)
    c = (own @ own.T)[others].mean().clamp(0.05, 0.95)
    noise = torch.randn(deltas.shape, generator=draws)
    noise = normalize(noise - noise @ direction.T * direction)
    return bound(deltas) * (c.sqrt() * direction + (1 - c).sqrt() * noise)


def takeover(number: int, deltas: Tensor, _draws: torch.Generator) -> Tensor:
    """Join a group by honest updates, then turn them around from round 5 on, at the norm bound."""
    factor = max(-1.0, 1 - 0.5 * max(0, number - 4))
    return factor * deltas if factor > -1 else -bound(deltas) * normalize(deltas)


def honest(_round: int, deltas: Tensor, _draws: torch.Generator) -> Tensor:
    """Send the result of training, on poisoned examples."""
    return deltas


def with_trigger(clients: MadeClients) -> None:
    """Add the trigger to half of the colluders' training examples, with the target for a label."""
    for client in clients.hostile:
        clients.inputs[client, : TRAIN // 2] += clients.trigger
        clients.labels[client, : TRAIN // 2] = TARGET


def of_the_victims(clients: MadeClients) -> None:
    """Give the colluders the labels of the group whose adapter they aim at."""
    for client in clients.hostile:
        clients.labels[client] = clients.names[VICTIMS][clients.topics[client]]


COLLUSIONS = {
    "identical vectors": Collusion(identical),
    "alternating": Collusion(alternating),
    "adapted to defense": Collusion(adapted),
    "sideways": Collusion(sideways),
    "takeover": Collusion(takeover, of_the_victims),
    "backdoor": Collusion(honest, with_trigger),
}

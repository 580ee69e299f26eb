"""Carrying out plans, whatever trains and measures: one client's alone, or those of several in step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.errors import ClientError
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Plan, Served, Train, UpdatePrivacy
from fedmerge_peft.training.reference import Trained
from fedmerge_peft.util.seeds import derive


@dataclass(frozen=True)
class ClientResult:
    """What a client has when its plan is done."""

    deltas: Tensor
    """As sent minus as trained, ``(k, P)``: a row for each adapter that was trained."""
    loss: float
    """Mean training loss (nats) of the adapter that is shared, or of the mixture's components by their posterior."""
    trained: Served
    """What the client would predict with now."""
    choice: int = 0
    """Which of the adapters sent was trained, where there was a choice."""
    weights: Tensor | None = None
    """A mixture's new π, ``(d,)``."""


@dataclass(frozen=True)
class TrainRequest:
    """A client's wish to train; ``Trained`` answers it."""

    job: Train
    seed: int
    """Decides all random draws of the job."""


@dataclass(frozen=True)
class Losses:
    """A client's wish for each of its training examples' summed loss (nats) with an adapter, without training; ``(n,)`` answers it."""

    row: Tensor
    """``(P,)``."""


Request = TrainRequest | Losses

Requests = Generator[Sequence[Request], list[Any], ClientResult]
"""What a plan asks for: wishes that do not depend on each other at a time, which are answered by a list; its work in the end."""


@dataclass(frozen=True)
class Hands:
    """What a client can do."""

    train: Callable[[Train, int], Trained]
    """``train(job, seed)``."""
    losses: Callable[[Tensor], Tensor]
    """``losses(row)``: each training example's summed loss (nats), ``(n,)``, without training."""


def carry_out(plan: Plan, hands: Hands, seed: int) -> ClientResult:
    """Do what a plan says. ``seed`` decides all random draws; a plan's further jobs derive theirs from it."""

    def train(fits: Sequence[tuple[int, TrainRequest]]) -> list[Trained]:
        return [hands.train(fit.job, fit.seed) for _, fit in fits]

    (work,) = carry_out_together([requests(plan, seed)], train, lambda _, row: hands.losses(row))
    if isinstance(work, ClientError):
        raise work
    return work


def carry_out_together(
    clients: Sequence[Requests],
    train: Callable[[Sequence[tuple[int, TrainRequest]]], Sequence[Trained | ClientError]],
    losses: Callable[[int, Tensor], Tensor | ClientError],
) -> list[ClientResult | ClientError]:
    """Do what several clients' plans say, step by step: all that they want trained at one time is trained by one call.

    Args:
        clients: What each client's plan asks for.
        train: Answers wishes to train, each with the position of its client; in the same order.
        losses: ``losses(client, row)``: the losses of this client's training examples.

    Returns:
        Each client's work. A ``ClientError`` for an answer ends the plan of its client, and stands in the place of its work.
    """
    work: dict[int, ClientResult | ClientError] = {}
    answers: dict[int, list[Any]] = {}
    while len(work) < len(clients):
        asked: list[tuple[int, Request]] = []
        for client, plan in enumerate(clients):
            if client not in work:
                try:
                    wishes = _answer(plan, answers.get(client))
                except StopIteration as done:
                    work[client] = done.value
                except ClientError as error:
                    work[client] = error
                else:
                    asked += [(client, wish) for wish in wishes]
        fits = [(client, wish) for client, wish in asked if isinstance(wish, TrainRequest)]
        trained = iter(train(fits) if fits else ())
        answers = {client: [] for client, _ in asked}
        for client, wish in asked:
            answers[client].append(
                next(trained) if isinstance(wish, TrainRequest) else losses(client, wish.row)
            )
    return [work[client] for client in range(len(clients))]


def _answer(plan: Requests, answers: list[Any] | None) -> Sequence[Request]:
    """What a plan asks for next, given what it asked for last."""
    if answers is None:
        return next(plan)
    failed = next((answer for answer in answers if isinstance(answer, ClientError)), None)
    return plan.send(answers) if failed is None else plan.throw(failed)


@singledispatch
def requests(plan: Plan, seed: int) -> Requests:
    """What a plan asks for, and what it makes of the answers."""
    raise TypeError(f"no plan: {type(plan).__name__}")


@requests.register
def _(plan: Train, seed: int) -> Requests:
    (trained,) = yield [TrainRequest(plan, seed)]
    delta = plan.row - trained.row
    if plan.privacy is not None:
        delta = apply_update_privacy(delta, plan.privacy, plan.phases, derive(seed, "release"))
    return ClientResult(delta[None], trained.loss, trained.row)


def apply_update_privacy(
    delta: Tensor, privacy: UpdatePrivacy, phases: Sequence[Tensor | None], seed: int
) -> Tensor:
    """An update as it leaves its client, ``(P,)``: clipped, and with noise in the columns that train in some phase."""
    delta = delta * min(
        1.0, privacy.clip / max(float(delta.double().norm()), torch.finfo(torch.float64).tiny)
    )
    noise = privacy.noise * torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed))
    for columns in phases:
        if columns is None:
            return delta + noise
    trained = torch.stack([columns for columns in phases if columns is not None]).any(dim=0)
    return torch.where(trained, delta + noise, delta)


@requests.register
def _(plan: InTurn, seed: int) -> Requests:
    done = yield [
        TrainRequest(job, derive(seed, "job", number) if number else seed)
        for number, job in enumerate(plan.jobs)
    ]
    deltas = torch.stack(
        [job.row - trained.row for job, trained in zip(plan.jobs, done, strict=True)]
    )
    return ClientResult(deltas, done[0].loss, done[-1].row)


@requests.register
def _(plan: Choose, seed: int) -> Requests:
    """IFCA's cluster estimate: argmin_j ℓ_i(Θ_j) (Ghosh et al. 2020, arXiv 2006.04088, algorithm 1), of equals one at random.

    Equals are the rule before the first round of a model without a head: LoRA's B = 0 makes all adapters the same function.
    """
    found = yield [Losses(row) for row in plan.rows]
    losses = torch.stack([each.double().sum() for each in found])
    losses = torch.where(losses.isnan(), torch.inf, losses)
    lowest = torch.nonzero(losses == losses.min()).flatten()
    choice = int(lowest[derive(seed, "choice") % len(lowest)])
    row = plan.rows[choice]
    (trained,) = yield [TrainRequest(Train(row), seed)]
    return ClientResult((row - trained.row)[None], trained.loss, trained.row, choice)


@requests.register
def _(plan: Mixture, seed: int) -> Requests:
    """FedEM's step at a client (Marfoq et al. 2021, arXiv 2108.10252, section 3), over its examples (x, y):

    E:  q(k | x, y) ∝ π_k · exp(−ℓ(θ_k; x, y))
    M:  π_k ← mean of q(k | x, y);  θ_k ← local training on q(k | x, y) · ℓ(θ_k; x, y)

    Its loss is the mean of Σ_k q(k | x, y) ℓ(θ_k; x, y): the components' losses are weighted by q already.
    """
    found = yield [Losses(row) for row in plan.rows]
    losses = torch.stack([each.double() for each in found])  # (d, n)
    posterior = torch.softmax(plan.weights.double().log()[:, None] - losses, dim=0)
    weights = posterior.mean(dim=1).to(plan.weights)
    done = yield [
        TrainRequest(Train(row, example_weights=each.float()), derive(seed, "component", number))
        for number, (row, each) in enumerate(zip(plan.rows, posterior, strict=True))
    ]
    rows = torch.stack([trained.row for trained in done])
    return ClientResult(
        plan.rows - rows,
        sum(trained.loss for trained in done),
        Mixture(rows, weights),
        weights=weights,
    )

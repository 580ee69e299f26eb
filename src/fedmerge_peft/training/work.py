"""Carrying out a plan, whatever trains and measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from fedmerge_peft.seeds import derive
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Plan, Served, Train
from fedmerge_peft.training.reference import Trained


@dataclass(frozen=True)
class Work:
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
class Hands:
    """What a client can do."""

    train: Callable[[Train, int], Trained]
    """``train(job, seed)``."""
    losses: Callable[[Tensor], Tensor]
    """``losses(row)``: each training example's summed loss (nats), ``(n,)``, without training."""


@singledispatch
def carry_out(plan: Plan, hands: Hands, seed: int) -> Work:
    """Do what a plan says. ``seed`` decides all random draws; a plan's further jobs derive theirs from it."""
    raise TypeError(f"no plan: {type(plan).__name__}")


@carry_out.register
def _(plan: Train, hands: Hands, seed: int) -> Work:
    trained = hands.train(plan, seed)
    return Work((plan.row - trained.row)[None], trained.loss, trained.row)


@carry_out.register
def _(plan: InTurn, hands: Hands, seed: int) -> Work:
    done = [hands.train(job, derive(seed, "job", number) if number else seed) for number, job in enumerate(plan.jobs)]
    deltas = torch.stack([job.row - trained.row for job, trained in zip(plan.jobs, done, strict=True)])
    return Work(deltas, done[0].loss, done[-1].row)


@carry_out.register
def _(plan: Choose, hands: Hands, seed: int) -> Work:
    """IFCA's cluster estimate: argmin_j ℓ_i(Θ_j) (Ghosh et al. 2020, arXiv 2006.04088, algorithm 1), of equals one at random.

    Equals are the rule before the first round of a model without a head: LoRA's B = 0 makes all adapters the same function.
    """
    losses = torch.stack([hands.losses(row).double().sum() for row in plan.rows])
    losses = torch.where(losses.isnan(), torch.inf, losses)
    lowest = torch.nonzero(losses == losses.min()).flatten()
    choice = int(lowest[derive(seed, "choice") % len(lowest)])
    row = plan.rows[choice]
    trained = hands.train(Train(row), seed)
    return Work((row - trained.row)[None], trained.loss, trained.row, choice)


@carry_out.register
def _(plan: Mixture, hands: Hands, seed: int) -> Work:
    """FedEM's step at a client (Marfoq et al. 2021, arXiv 2108.10252, section 3), over its examples (x, y):

    E:  q(k | x, y) ∝ π_k · exp(−ℓ(θ_k; x, y))
    M:  π_k ← mean of q(k | x, y);  θ_k ← local training on q(k | x, y) · ℓ(θ_k; x, y)

    Its loss is the mean of Σ_k q(k | x, y) ℓ(θ_k; x, y): the components' losses are weighted by q already.
    """
    losses = torch.stack([hands.losses(row).double() for row in plan.rows])  # (d, n)
    posterior = torch.softmax(plan.weights.double().log()[:, None] - losses, dim=0)
    weights = posterior.mean(dim=1).to(plan.weights)
    done = [
        hands.train(Train(row, example_weights=each.float()), derive(seed, "component", number))
        for number, (row, each) in enumerate(zip(plan.rows, posterior, strict=True))
    ]
    rows = torch.stack([trained.row for trained in done])
    return Work(plan.rows - rows, sum(trained.loss for trained in done), Mixture(rows, weights), weights=weights)

"""Execution of plans, given functions that train and score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedmerge_peft.training.plan import ClientResult, Plan, Train, Trained, TrainRequest


def run_plans(
    plans: Sequence[tuple[Plan, int]],
    train: Callable[[Sequence[tuple[int, TrainRequest]]], Sequence[Trained | Exception]],
    losses: Callable[[int, Tensor], Tensor],
    statistics: Callable[[int, Tensor], Tensor] | None = None,
) -> list[ClientResult | Exception]:
    """Run several plans phase by phase. One call of ``train`` handles the requests of all plans.

    Args:
        plans: Each client's plan and seed.
        train: ``train(requests)`` trains adapters. Each request comes with the position of its plan
            in ``plans``. The function returns the outcome or the exception of each request, in the
            same order.
        losses: ``losses(position, row)`` computes the summed loss (nats) of each training example
            of one client, ``(n,)``. ``position`` is that of the client's plan in ``plans``, and
            ``row`` is the adapter, ``(P,)``.
        statistics: ``statistics(position, row)`` computes the class statistics of the same
            examples under the adapter ``row``, ``(classes, d + 2)``
            (``features.class_statistics``). Without this function, results have no statistics.

    Returns:
        Each client's result, or the exception that ended its plan; the other plans continue.
    """
    scores: dict[int, list[Tensor]] = {}
    requests: dict[int, Sequence[TrainRequest]] = {}
    outcomes: dict[int, ClientResult | Exception] = {}
    for position, (plan, seed) in enumerate(plans):
        try:
            scores[position] = [losses(position, row) for row in plan.scored_rows]
            requests[position] = plan.train_requests(scores[position], seed)
        except Exception as error:
            outcomes[position] = error
    queue = [(position, request) for position in requests for request in requests[position]]
    trained: dict[int, list[Trained | Exception]] = {position: [] for position in requests}
    for (position, _), outcome in zip(queue, train(queue), strict=True):
        trained[position].append(outcome)
    for position, results in trained.items():
        plan, seed = plans[position]
        try:
            done = [_checked(result) for result in results]
            result = plan.result(done, scores[position], seed)
            if (measured := plan.measured_rows(done)) and statistics is not None:
                stacked = torch.stack([statistics(position, row) for row in measured])
                result = replace(result, statistics=stacked)
            outcomes[position] = result
        except Exception as error:
            outcomes[position] = error
    return [outcomes[position] for position in range(len(plans))]


def run_plan(
    plan: Plan,
    seed: int,
    train: Callable[[Train, int], Trained],
    losses: Callable[[Tensor], Tensor],
    statistics: Callable[[Tensor], Tensor] | None = None,
) -> ClientResult:
    """Run one client's plan; raise the exception that ends it.

    Args:
        plan: The plan.
        seed: Seed of all random draws of the plan.
        train: ``train(job, seed)`` trains one adapter.
        losses: ``losses(row)`` computes the summed loss (nats) of each of the client's training
            examples under the adapter ``row``, ``(n,)``.
        statistics: ``statistics(row)`` computes the class statistics of these examples under the
            adapter ``row``, ``(classes, d + 2)`` (``features.class_statistics``). Without this
            function, the result has no statistics.
    """
    (outcome,) = run_plans(
        [(plan, seed)],
        lambda queue: [train(request.job, request.seed) for _, request in queue],
        lambda _, row: losses(row),
        None if statistics is None else lambda _, row: statistics(row),
    )
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _checked(outcome: Trained | Exception) -> Trained:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome

"""Whether a reply is what its plan asked for: what every reply must pass before a strategy sees it, whichever engine brought it.

A reply that does not pass is left out whole, so that soup, weights and private states stay as if its client had not been asked.
Values are not judged here: an update of the right form that leads elsewhere is the defence's business (``aggregation.py``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Choose, Mixture, Plan
from fedmerge_peft.util.stateful import describe
from fedmerge_peft.util.vectors import all_finite


def fault(
    reply: Reply, plan: Plan, round: int, size: int, timeout: float | None = None
) -> str | None:
    """Why a reply cannot count, in words; None where it can.

    Args:
        reply: As it came.
        plan: What its client was asked to do.
        round: The round in which it was asked.
        size: How many training examples the client has, as the federation knows it.
        timeout: Seconds that it may have taken.
    """
    if reply.round not in (None, round):
        return f"it answers for round {reply.round}"
    if timeout is not None and not reply.seconds <= timeout:
        return f"it took {reply.seconds:.1f} s, and clients.timeout is {timeout:g} s"
    if reply.size != size:
        return f"it speaks for {reply.size} examples, and has {size}"
    rows = 1 if isinstance(plan, Choose) else len(plan.sent)
    if wrong := _form(reply.deltas, (rows, plan.sent.shape[1])):
        return f"its update is {wrong}"
    if not math.isfinite(reply.train_loss):
        return f"its training loss is {reply.train_loss}"
    if isinstance(plan, Choose) and not (
        type(reply.choice) is int and 0 <= reply.choice < len(plan.rows)
    ):
        return f"it chose adapter {reply.choice} of {len(plan.rows)}"
    if isinstance(plan, Mixture):
        if reply.weights is None or (wrong := _form(reply.weights, tuple(plan.weights.shape))):
            return f"its weights are {'missing' if reply.weights is None else wrong}"
        if bool((reply.weights < 0).any()) or abs(float(reply.weights.sum()) - 1) > 1e-3:
            return "its weights are negative or do not sum to 1"
    return None


def _form(value: object, shape: tuple[int, ...]) -> str | None:
    """What is wrong with numbers that should be a finite float32 tensor on the CPU of this shape, each with a place of its own."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, expected a tensor"
    if value.layout is not torch.strided or value.device.type != "cpu":
        return f"{str(value.layout).removeprefix('torch.')} on {value.device}, expected strided on the CPU"
    if value.dtype != torch.float32 or tuple(value.shape) != shape:
        return f"{describe(value)}, expected float32 {shape}"
    if not all_finite(value):
        return "not finite"
    return None

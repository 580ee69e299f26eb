"""Check that a reply is what its plan asked for, before a strategy sees it.

A reply that fails is left out whole: soup, weights and private states stay as if its client had not
been asked. Values are not judged here. An update of the right form that leads elsewhere is a matter
for robust aggregation (``strategies/aggregation.py``).
"""

from __future__ import annotations

import math

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Plan
from fedmerge_peft.util.vectors import tensor_mismatch


def validate_reply(
    reply: Reply, plan: Plan, round: int, size: int, timeout: float | None = None
) -> str | None:
    """Return the reason why a reply cannot count, or None if it can.

    Args:
        reply: The reply as it came.
        plan: The plan that its client was sent.
        round: The round in which the client was asked.
        size: The client's number of training examples, as the federation knows it.
        timeout: Seconds that the client may take; None for no limit.
    """
    if reply.round not in (None, round):
        return f"it answers for round {reply.round}"
    if timeout is not None and not reply.seconds <= timeout:
        return f"it took {reply.seconds:.1f} s, and clients.timeout is {timeout:g} s"
    if reply.size != size:
        return f"it reports {reply.size} examples, and has {size}"
    shape = (plan.returned_rows, plan.sent.shape[1])
    if (problem := tensor_mismatch(reply.deltas, shape)) is not None:
        return f"its update is {problem}"
    if not math.isfinite(reply.train_loss):
        return f"its training loss is {reply.train_loss}"
    return plan.mismatch(reply.choice, reply.weights)

"""Validation of replies against their plans, before a strategy processes them.

An invalid reply has no effect on soup, weights and private states. Only the form of a reply is
checked. Robust aggregation (``strategies/aggregation.py``) handles updates of valid form with
malicious values.
"""

from __future__ import annotations

import math

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Plan
from fedmerge_peft.util.vectors import tensor_mismatch


def validate_reply(
    reply: Reply, plan: Plan, round: int, size: int, timeout: float | None = None
) -> str | None:
    """Return the reason why a reply is invalid, or None if it is valid.

    Args:
        reply: The reply as received.
        plan: The plan of the client.
        round: The round of the plan.
        size: The client's number of training examples in the federation.
        timeout: Seconds that the client may take; None for no limit.
    """
    if reply.round not in (None, round):
        return f"its reply belongs to round {reply.round}"
    if timeout is not None and not reply.seconds <= timeout:
        return f"it took {reply.seconds:.1f} s, but clients.timeout is {timeout:g} s"
    if reply.size != size:
        return f"it reports {reply.size} examples, but has {size}"
    shape = (plan.returned_rows, plan.sent.shape[1])
    if (problem := tensor_mismatch(reply.deltas, shape)) is not None:
        return f"its update is {problem}"
    if reply.train_loss is not None and not math.isfinite(reply.train_loss):
        return f"its training loss is {reply.train_loss}"
    if plan.statistics_shape is not None:
        if reply.statistics is None:
            return "its class statistics are missing"
        if (problem := tensor_mismatch(reply.statistics, plan.statistics_shape)) is not None:
            return f"its class statistics are {problem}"
        counts = reply.statistics[..., 0]
        if bool((counts < 0).any()) or bool((counts.sum(dim=1) != size).any()):
            total = float(counts.sum(dim=1).max())
            return f"its class statistics count {total:g} examples, but it has {size}"
    return plan.mismatch(reply.choice, reply.weights)

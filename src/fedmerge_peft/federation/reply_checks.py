"""Validation of replies against their plans, before a strategy processes them.

An invalid reply has no effect on the strategy. The checks cover the form of a reply and the range
of its numbers: an update with a norm above ``MAX_NORM`` could overflow a sum.
Robust aggregation (``strategies/aggregation.py``) handles updates of valid form with malicious
values.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Plan, Train
from fedmerge_peft.util.ranges import MAX_SCORE, MAX_SECONDS
from fedmerge_peft.util.vectors import norm_fault, row_norms, tensor_mismatch


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
    if not 0 <= reply.seconds <= MAX_SECONDS:
        return f"it took {reply.seconds} s"
    if reply.size != size:
        return f"it reports {reply.size} examples, but has {size}"
    shape = (plan.returned_rows, plan.sent.shape[1])
    if (problem := tensor_mismatch(reply.deltas, shape)) is not None:
        return f"its update is {problem}"
    if (problem := norm_fault(reply.deltas)) is not None:
        return f"its update is {problem}"
    if reply.train_loss is not None and not abs(reply.train_loss) <= MAX_SCORE:
        return f"its training loss is {reply.train_loss}"
    if reply.validation is not None:
        number = 3 if isinstance(plan, Train) and plan.compared is not None else 2
        if len(reply.validation) != number:
            return f"it reports {len(reply.validation)} validation losses, expected {number}"
    if plan.statistics_shape is not None:
        if reply.statistics is None:
            return "its class statistics are missing"
        if (problem := tensor_mismatch(reply.statistics, plan.statistics_shape)) is not None:
            return f"its class statistics are {problem}"
        counts = reply.statistics[..., 0]
        if bool((counts < 0).any()):
            return f"its class statistics count {float(counts.min()):g} examples of a class"
        totals = counts.sum(dim=1)
        if len(wrong := totals[totals != size]):
            return f"its class statistics count {float(wrong[0]):g} examples, but it has {size}"
    return plan.mismatch(reply.choice, reply.weights)


def largest_updates(replies: Sequence[Reply], names: Sequence[str]) -> str:
    """Return the part of a divergence error that names the clients with the largest updates."""
    norms = sorted((float(row_norms(reply.deltas).max()), reply.client) for reply in replies)
    middle = norms[len(norms) // 2][0]
    largest = ", ".join(f"{names[client]} ({norm:.3g})" for norm, client in norms[:-4:-1])
    return (
        f"The round had no effect. The largest updates, by L2 norm, are those of {largest}; the "
        f"median norm is {middle:.3g}. Resuming repeats the round; if it fails again, start a run "
        "with bounded updates (robustness.norm_multiple) or with smaller step sizes of the strategy"
    )

"""Validation of replies against their plans, before a strategy processes them.

An invalid reply has no effect on the strategy. The checks cover the form of a reply and the range
of its numbers: an update with a norm above ``MAX_NORM`` could overflow a sum.
Robust aggregation (``strategies/aggregation.py``) handles updates of valid form with malicious
values.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Plan
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
        return f"it took {reply.seconds} s, expected 0 to {MAX_SECONDS:g} s"
    if reply.size != size:
        return f"its reported number of training examples is {reply.size}, expected {size}"
    shape = (plan.returned_rows, plan.sent.shape[1])
    if (problem := tensor_mismatch(reply.deltas, shape)) is not None:
        return f"its update is {problem}"
    if (problem := norm_fault(reply.deltas)) is not None:
        return f"its update is {problem}"
    if reply.train_loss is not None and not abs(reply.train_loss) <= MAX_SCORE:
        return (
            f"its training loss is {reply.train_loss}, expected a finite number of at most "
            f"{MAX_SCORE:g}"
        )
    if reply.validation is not None:
        number = len(plan.validated_rows(plan.sent[0]))
        if len(reply.validation) != number:
            return f"its number of validation losses is {len(reply.validation)}, expected {number}"
    if plan.statistics_shape is not None:
        if reply.statistics is None:
            return "its class statistics are missing"
        if (problem := tensor_mismatch(reply.statistics, plan.statistics_shape)) is not None:
            return f"its class statistics are {problem}"
        counts = reply.statistics[..., 0]
        if bool((counts < 0).any()):
            least = float(counts.min())
            return f"its class statistics have {least:g} as the count of a class, expected >= 0"
        totals = counts.sum(dim=1)
        if len(wrong := totals[totals != size]):
            total = float(wrong[0])
            return (
                f"the counts in its class statistics have the sum {total:g}, expected {size}, its "
                "number of training examples"
            )
    return plan.mismatch(reply.choice, reply.weights)


def largest_updates(replies: Sequence[Reply], names: Sequence[str]) -> str:
    """Return the part of a divergence error that names the clients with the largest updates."""
    norms = sorted((float(row_norms(reply.deltas).max()), reply.client) for reply in replies)
    middle = norms[len(norms) // 2][0]
    largest = ", ".join(f"{names[client]} ({norm:.3g})" for norm, client in norms[:-4:-1])
    whose = "updates, by L2 norm, are those" if len(norms) > 1 else "update, by L2 norm, is that"
    return (
        f"The largest {whose} of {largest} (median: {middle:.3g}); if a resumed run fails again, "
        "start a run with bounded updates (robustness.norm_multiple) or with smaller step sizes of "
        "the strategy"
    )

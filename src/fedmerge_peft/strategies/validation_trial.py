"""Trials of groups: comparisons of merged adapters with alternatives by validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.util.stateful import Stateful

FIRST, LAST = 3, 8
"""Rounds after the grouping, counted from 1: ``OwnTrial`` may end from round ``FIRST`` on, and no
trial continues after round ``LAST``."""
_LEAST_HARM = 0.01
"""Smallest relative rise of the validation loss by merging that is not attributed to chance."""
_LASTING = 0.8
"""Smallest ratio of the harm to that of the previous comparison at which the harm persists."""
_LEAST_GAIN = 0.02
"""Smallest relative fall of the validation loss by grouping at which the groups are kept."""
_CERTAIN = 3
"""Number of standard errors above which a small gain is not attributed to chance."""
_ROUNDS_WITHOUT_GAIN = 2
"""Number of rounds without a gain after which the groups are dissolved."""


@dataclass(frozen=True)
class LossComparison:
    """Mean validation losses (nats) of own and merged adapters, over clients with both losses."""

    own: float
    """Mean loss of the adapters that the clients had trained, (1/k) Σ_i L_i(θ_i(trained))."""
    merged: float
    """Mean loss of the adapters that the clients were sent next, (1/k) Σ_i L_i(θ_i(sent next))."""
    error: float
    """Standard error of the difference (nats)."""

    @property
    def own_is_better(self) -> bool:
        """True if merging raised the loss by more than two standard errors and more than 1 %."""
        return self.harm > max(2 * self.error, _LEAST_HARM * self.own)

    @property
    def harm(self) -> float:
        """Rise of the loss (nats) that merging causes."""
        return self.merged - self.own


class OwnTrial(Stateful):
    """Comparison of the clients' own trained adapters with their merged adapters.

    The adapter that a client trains in one round, and the adapter that is merged for it in the next
    round, result from the same number of rounds. The first contains the client's own update, the
    second the mean update of its group. If clients help each other, the mean is better on
    validation examples.

    Right after the grouping, a client's own update reduces the loss more than any mean, because
    both adapters are far from convergence. Merging therefore raises the loss at first; this rise is
    the harm. If clients help each other, the harm shrinks from round to round and turns into a
    gain. In experiments, the gain was 1 to 13 % of the loss in the third round. If clients have
    nothing in common, the harm persists.
    """

    state_fields = ("losses", "harm")

    def __init__(self, clients: int) -> None:
        self.losses = torch.full((clients,), torch.nan, dtype=torch.float64)
        """L_i (nats) of each client's trained adapter, ``(m,)`` float64; nan if unknown."""
        self.harm = torch.tensor(torch.inf, dtype=torch.float64)
        """Harm in the previous comparison, ``()`` float64; infinite before the first comparison."""

    def persists(self, loss: LossComparison) -> bool:
        """Return True if the harm is at least 0.8 times the harm of the previous comparison.

        The result is False in the first comparison. The harm is stored for the next comparison.
        """
        before, self.harm = float(self.harm), torch.tensor(loss.harm, dtype=torch.float64)
        return loss.harm >= _LASTING * before

    def store(self, replies: Sequence[Reply]) -> None:
        """Store the validation losses after local training."""
        for reply in replies:
            if reply.validation is not None:
                self.losses[reply.client] = reply.validation[1]

    def compare(self, replies: Sequence[Reply]) -> LossComparison | None:
        """Compare the stored losses with the losses before this round's training.

        Return None if fewer than half of all clients, or fewer than two, have both losses.
        """
        pairs = torch.tensor(
            [
                (float(self.losses[reply.client]), reply.validation[0])
                for reply in replies
                if reply.validation is not None
            ],
            dtype=torch.float64,
        ).reshape(-1, 2)
        pairs = pairs[pairs.isfinite().all(dim=1)]
        if len(pairs) < max(2, len(self.losses) / 2):
            return None
        own, merged = pairs.mean(dim=0).tolist()
        return LossComparison(own, merged, standard_error(pairs[:, 1] - pairs[:, 0]))


class CommonTrial(Stateful):
    """Comparison of the adapters of groups with one adapter for all clients.

    Updates of clients may differ in aspects that do not matter for predictions, such as the topics
    of reviews, if the clients predict only the sentiment. Each group then needlessly learns from
    only a part of the examples. In the rounds after the grouping, each client is also sent the mean
    of all merged adapters. It does not train the mean, and reports both validation losses. In
    experiments with real groups, the mean was worse by 6 to 150 % in the first round, and by more
    in the next. In experiments with such reviews, it was worse by about 1 %.
    """

    state_fields = ("rounds",)

    def __init__(self) -> None:
        self.rounds = 0
        """Number of rounds without a gain."""

    def decide(self, replies: Sequence[Reply]) -> tuple[bool | None, str]:
        """Return the decision, and a text with the losses.

        The decision is True to keep the groups, False to dissolve them, and None to continue.
        """
        pairs = torch.tensor(
            [
                (reply.validation[0], reply.validation[2])
                for reply in replies
                if reply.validation is not None and len(reply.validation) > 2
            ],
            dtype=torch.float64,
        ).reshape(-1, 2)
        pairs = pairs[pairs.isfinite().all(dim=1)]
        if len(pairs) < 2:
            return None, ""
        grouped, common = pairs.mean(dim=0).tolist()
        losses = f"{grouped:.3g} by group, {common:.3g} with one adapter"
        gain = common - grouped
        if gain >= _LEAST_GAIN * abs(grouped):
            return True, losses
        if gain > _CERTAIN * standard_error(pairs[:, 1] - pairs[:, 0]):
            return None, losses  # the gain is small so far, as in a run that learns slowly
        self.rounds += 1
        return (False if self.rounds == _ROUNDS_WITHOUT_GAIN else None), losses


Outcome = Literal["keep", "share", "separate"]
"""Keep the groups, give all clients one adapter, or give each client its own adapter."""


class GroupTrials(Stateful):
    """Trials in the rounds after the grouping. A trial is None if it does not apply or has ended.

    Args:
        clients: m, the number of clients.
    """

    state_fields = ("own", "common")

    def __init__(self, clients: int) -> None:
        self.own: OwnTrial | None = OwnTrial(clients)
        self.common: CommonTrial | None = CommonTrial()

    @property
    def running(self) -> bool:
        """True while a trial needs the clients' validation losses."""
        return self.own is not None or self.common is not None

    def begin(self, groups: int, *, blocks: bool) -> None:
        """End the trials that do not apply to this number of groups, or to merging by block."""
        if self.own is not None and groups == len(self.own.losses):
            self.own = None
        if self.own is None or groups == 1 or blocks:
            self.common = None

    def decide(self, number: int, replies: Sequence[Reply]) -> list[tuple[Outcome, str]]:
        """Return the outcomes that trials reach with this round's replies, and the reasons.

        A trial with an outcome ends. In round ``LAST``, trials without an outcome also end.

        Args:
            number: Round after the grouping, from 1.
            replies: Replies of this round.
        """
        outcomes: list[tuple[Outcome, str]] = []
        if self.common is not None:
            keep, losses = self.common.decide(replies)
            if keep is not None:
                self.common = None
                outcomes.append(
                    ("keep", f"groups kept: validation loss {losses}")
                    if keep
                    else ("share", f"one adapter for all clients: validation loss {losses}")
                )
        if self.own is not None:
            loss = self.own.compare(replies)
            self.own.store(replies)
            persistent = loss is not None and self.own.persists(loss)
            if loss is not None and number >= FIRST:
                losses = f"{loss.own:.3g} after own training, {loss.merged:.3g} after merging"
                if not loss.own_is_better:
                    outcomes.append(("keep", f"merging kept: validation loss {losses}"))
                    self.own = None
                elif persistent:
                    reason = f"an adapter for each client: validation loss {losses}"
                    outcomes.append(("separate", reason))
                    self.own = self.common = None
        if number >= LAST:
            self.own = self.common = None
        return outcomes


def standard_error(values: Tensor) -> float:
    """Compute the standard error of the mean of values ``(n,)``, n > 1."""
    return float(values.std() / len(values) ** 0.5)

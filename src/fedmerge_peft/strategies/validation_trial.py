"""Trials of groups: comparisons of merged adapters with others, by loss on validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.util.stateful import Stateful

FIRST, LAST = 3, 8
"""First and last round after the grouping in which the trial may end."""
_LEAST_HARM = 0.01
"""Least relative rise of the validation loss by merging; less is put down to chance."""
_LASTING = 0.8
"""Least harm that lasts, relative to that of the round before."""
_LEAST_GAIN = 0.02
"""Least relative fall of the validation loss by groups."""
_CERTAIN = 3
"""Number of standard errors above which a small gain is not put down to chance."""
_ROUNDS_WITHOUT_GAIN = 2
"""Number of rounds after which groups without a gain end."""


@dataclass(frozen=True)
class LossComparison:
    """Mean validation losses (nats) over the clients with both."""

    own: float
    """Of the adapters that the clients had trained, (1/k) Σ_i L_i(θ_i(trained))."""
    merged: float
    """Of those that they were sent next, (1/k) Σ_i L_i(θ_i(sent next))."""
    error: float
    """Standard error of the difference."""

    @property
    def own_is_better(self) -> bool:
        """True if merging raised the loss by more than chance: two standard errors, and 1 %."""
        return self.harm > max(2 * self.error, _LEAST_HARM * self.own)

    @property
    def harm(self) -> float:
        """Rise of the loss (nats) by merging."""
        return self.merged - self.own


class OwnTrial(Stateful):
    """Losses of the clients' own adapters, to be compared with those of the merged ones.

    The adapter that a client has trained in one round, and the one that is merged for it in the
    next, have seen the same rounds. The first has the client's own update, the second the mean of
    its group's. Where clients help each other, the mean is better on examples that nobody trained
    on.

    Right after the grouping, a client's own update is ahead of any mean, because both have far to
    go. Where clients help each other, this harm shrinks from round to round and turns into a gain:
    in trials, of 1 to 13 % of the loss in the third round. Where they have nothing in common, it
    lasts.
    """

    state_fields = ("losses", "harm")

    def __init__(self, clients: int) -> None:
        self.losses = torch.full((clients,), torch.nan, dtype=torch.float64)
        """L_i of the client's trained adapter, ``(m,)``; nan if unknown."""
        self.harm = torch.tensor(torch.inf, dtype=torch.float64)
        """Harm in the round before, ``()`` float64; infinite before the first comparison."""

    def persists(self, loss: LossComparison) -> bool:
        """Return True if this harm is at least 0.8 times that of the round before; store it."""
        before, self.harm = float(self.harm), torch.tensor(loss.harm, dtype=torch.float64)
        return loss.harm >= _LASTING * before

    def store(self, replies: Sequence[Reply]) -> None:
        """Store the validation losses after local training."""
        for reply in replies:
            if reply.validation is not None:
                self.losses[reply.client] = reply.validation[1]

    def compare(self, replies: Sequence[Reply]) -> LossComparison | None:
        """Compare with the losses before this round's training.

        Returns None if fewer than half of all clients, or fewer than two, have both losses.
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

    Updates of clients may differ by what does not matter for their predictions, such as the topic
    of a review for its sentiment. Each group then learns from a part of the examples without need.
    In the rounds after the grouping, each client is also sent the mean of all adapters, which it
    does not train, and reports both validation losses. In trials with real groups, the mean was
    worse by 6 to 150 % in the first round, and by more in the next; otherwise by about 1 %.
    """

    state_fields = ("rounds",)

    def __init__(self) -> None:
        self.rounds = 0
        """Rounds without a gain."""

    def decide(self, replies: Sequence[Reply]) -> tuple[bool | None, str]:
        """Return True to keep the groups, False to end them and None to go on; and the losses."""
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
            return None, losses  # small so far, as in a run that learns slowly
        self.rounds += 1
        return (False if self.rounds == _ROUNDS_WITHOUT_GAIN else None), losses


Outcome = Literal["keep", "share", "separate"]
"""Keep the groups, give all clients one adapter, or give each client its own."""


class GroupTrials(Stateful):
    """Trials in the rounds after the grouping. Each is None if there is none, or when it is over.

    Args:
        clients: m, the number of clients.
    """

    state_fields = ("own", "common")

    def __init__(self, clients: int) -> None:
        self.own: OwnTrial | None = OwnTrial(clients)
        self.common: CommonTrial | None = CommonTrial()

    def begin(self, groups: int, *, blocks: bool) -> None:
        """End the trials that do not apply to this number of groups."""
        if self.own is not None and groups == len(self.own.losses):
            self.own = None
        if self.own is None or groups == 1 or blocks:
            self.common = None

    def decide(self, number: int, replies: Sequence[Reply]) -> list[tuple[Outcome, str]]:
        """Return the outcomes of trials that end in this round after the grouping, with reasons."""
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
    """Return the standard error of the mean of values ``(n,)``, n > 1."""
    return float(values.std() / len(values) ** 0.5)

"""Comparison of merged adapters with the clients' own ones, by loss on validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Comparison:
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


class ValidationTrial(Stateful):
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

    def lasting(self, found: Comparison) -> bool:
        """Return True if this harm is at least 0.8 times that of the round before; store it."""
        before, self.harm = float(self.harm), torch.tensor(found.harm, dtype=torch.float64)
        return found.harm >= _LASTING * before

    def store(self, replies: Sequence[Reply]) -> None:
        """Store the validation losses after local training."""
        for reply in replies:
            if reply.validation is not None:
                self.losses[reply.client] = reply.validation[1]

    def compare(self, replies: Sequence[Reply]) -> Comparison | None:
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
        return Comparison(own, merged, standard_error(pairs[:, 1] - pairs[:, 0]))


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values ``(n,)``, n > 1."""
    return float(values.std() / len(values) ** 0.5)

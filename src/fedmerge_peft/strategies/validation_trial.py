"""Comparison of merged adapters with the clients' own ones, by loss on validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.util.stateful import Stateful

TRIAL_ROUNDS = 3
"""Rounds after the grouping at whose end the comparison is made. Right after the grouping, a
client's own update is ahead of any mean, because both have far to go. In trials, real groups were
ahead by 1 to 13 % of the loss in the third round."""
_LEAST_GAIN = 0.01
"""Least relative gain in validation loss, below which a difference is put down to chance."""


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
        return self.merged - self.own > max(2 * self.error, _LEAST_GAIN * self.own)


class ValidationTrial(Stateful):
    """Losses of the clients' own adapters, to be compared with those of the merged ones.

    The adapter that a client has trained in one round, and the one that is merged for it in the
    next, have seen the same rounds. The first has the client's own update, the second the mean of
    its group's. Where clients help each other, the mean is better on examples that nobody trained
    on.
    """

    state_fields = ("losses",)

    def __init__(self, clients: int) -> None:
        self.losses = torch.full((clients,), torch.nan, dtype=torch.float64)
        """L_i of the client's trained adapter, ``(m,)``; nan if unknown."""

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

"""Hyperparameters that a recipe leaves to the federation: ``auto`` in its section ``training``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fedmerge_peft.recipe.schema import TrainingRecipe

MAX_LEARNING_RATE = 10.0
"""Largest learning rate that a federation chooses."""
MAX_EPOCHS = 4
"""Largest number of epochs per round that a federation chooses. More epochs mostly overfit a
client's few examples, and move the clients' adapters apart before they are merged."""
_STEPS_PER_RUN = 200
"""Target for a client's optimizer steps in a whole run. For comparison, the shipped recipe
quickstart takes 64, and text_tasks 120."""
_STEPS_PER_ROUND = 10
"""Smallest target for a client's optimizer steps in a round. A step of AdamW changes a parameter by
about the learning rate, and each round starts with a new optimizer state. Fewer steps would hardly
change the adapter."""


@dataclass(frozen=True)
class Hyperparameters:
    """Values for the keys of ``training`` that are ``auto``; None keeps the recipe's own value."""

    learning_rate: float | None = None
    epochs: int | None = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Hyperparameters:
        """Check and return values from a file or a message.

        Raises:
            ValueError: The learning rate is not a number above 0 and at most
                ``MAX_LEARNING_RATE``, the number of epochs is not an integer from 1 to
                ``MAX_EPOCHS``, or there are other keys.
        """
        if unknown := fields.keys() - {"learning_rate", "epochs"}:
            raise ValueError(f"unknown hyperparameters {', '.join(sorted(map(str, unknown)))}")
        rate, epochs = fields.get("learning_rate"), fields.get("epochs")
        if rate is not None and not (
            type(rate) in (int, float) and 0 < rate <= MAX_LEARNING_RATE  # false for NaN
        ):
            raise ValueError(
                f"learning_rate is {rate!r}, expected a number above 0 and at most "
                f"{MAX_LEARNING_RATE:g}"
            )
        if epochs is not None and not (type(epochs) is int and 1 <= epochs <= MAX_EPOCHS):
            raise ValueError(f"epochs is {epochs!r}, expected an integer from 1 to {MAX_EPOCHS}")
        return cls(None if rate is None else float(rate), epochs)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the values by key, as ``parse`` reads them."""
        return asdict(self)

    def apply_to(self, training: TrainingRecipe) -> TrainingRecipe:
        """Return the section with these values in place of ``auto``."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        return training.model_copy(update=values) if values else training


def automatic_epochs(training: TrainingRecipe, rounds: int, sizes: Sequence[int]) -> int:
    """Compute the number of epochs per round for ``training.epochs: auto``.

    The targets for a client of median size are 200 optimizer steps in the whole run, and at least
    10 per round. The result is limited to 1 to 4 epochs. For R rounds, and a median of n examples
    per client:

    s = ⌈n / (batch_size · gradient_accumulation)⌉    steps in an epoch
    epochs = min(4, ⌈max(10, 200 / R) / s⌉)

    Args:
        training: Batch size and gradient accumulation. With ``steps``, the result is 1, because
            epochs are not used.
        rounds: R, the rounds of the recipe.
        sizes: Training examples of each client. Clients without examples are not counted. If no
            client is left, n is 1.
    """
    if training.steps is not None:
        return 1
    size = median([size for size in sizes if size > 0] or [1])
    steps = math.ceil(size / (training.batch_size * training.gradient_accumulation))
    return min(MAX_EPOCHS, math.ceil(max(_STEPS_PER_ROUND, _STEPS_PER_RUN / rounds) / steps))

"""Settings of tasks whose labels differ in frequency."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedmerge_peft.recipe.section import Section


def _named(value: object) -> object:
    """Convert the keys of a mapping to text: in Python, a label such as 0 may be a number."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


ClassWeight = Annotated[float, Field(ge=1e-6, le=1e6)]
ClassWeights = Annotated[
    Literal["balanced"] | Annotated[dict[str, ClassWeight], Field(min_length=1)],
    BeforeValidator(_named),
]


class ImbalanceSettings(Section):
    """Weights of labels, and the focal loss. Evaluation uses neither of them."""

    class_weights: ClassWeights | None = None
    """Weights of the labels in the training loss, by name. Labels that are not listed have weight
    1. The loss of a step is a weighted mean. balanced: weights that are inversely proportional to
    the frequencies of the labels in each client's training examples. In tasks with several labels
    per example, a weight multiplies the loss of a label only for the examples that have it, and the
    loss of a step is not divided by the sum of the weights. There, balanced is the number of a
    client's training examples without the label, divided by the number with it."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Exponent γ of the focal loss, which multiplies the training loss -log p by (1 - p)^γ, so that
    easy examples count less. p is the probability of the true label. 2 is usual; 0 gives the plain
    loss."""

    @property
    def imbalance(self) -> ImbalanceSettings:
        """Settings of the training loss for labels that differ in frequency: this section."""
        return self

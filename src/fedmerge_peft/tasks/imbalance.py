"""Class weights and the focal loss, for imbalanced labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.tasks.labels import unknown_label

if TYPE_CHECKING:
    from fedmerge_peft.recipe.tasks import TaskRecipe


class WeightedClasses(Task):
    """Base of tasks with class weights and the focal loss, for loss terms -log p.

    p is the predicted probability of the true label. In a set of labels, there is one term for each
    label, and p is the predicted probability of its true value, 0 or 1.
    """

    names_classes: ClassVar[bool] = True
    recipe: Any

    @abstractmethod
    def term_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute -log p of each term, in the shape of the labels; 0 for terms without a label.

        Arguments are those of ``losses``.
        """

    def term_weights(self, labels: Tensor, class_weights: Tensor) -> Tensor:
        """Return the weight of each term, in the shape of the labels; 0 for terms without a label.

        Arguments are those of ``training_losses``.
        """
        classes = labels.flatten(1) if labels.ndim > 1 else labels[:, None]
        weights = class_weights.gather(1, classes.clamp_min(0)) * (classes >= 0)
        return weights.view_as(labels)

    def balanced_weights(self, labels: Sequence[Tensor]) -> Tensor:
        """Compute w_c = n / (C · n_c), so that all classes that occur have the same sum of weights.

        n_c is the number of terms of class c, n the number of all terms, and C the number of
        classes with n_c > 0. Classes with n_c = 0 have the weight 1. The formula is scikit-learn's.

        Args:
            labels: Labels of a client's training examples.
        """
        terms = torch.cat([row.flatten() for row in labels])
        counts = torch.bincount(terms[terms >= 0], minlength=len(self.labels))
        known = counts > 0
        return torch.where(known, counts.sum() / (known.sum() * counts.clamp_min(1)), 1.0)

    def class_weights(self, examples: Examples, indices: NDArray[Any]) -> Tensor | None:
        given = self.recipe.imbalance.class_weights
        if given is None or not len(indices):
            return None
        if given == "balanced":
            return self.balanced_weights([examples.columns["labels"][index] for index in indices])
        return torch.tensor([given.get(name, 1.0) for name in self.labels])

    def training_losses(
        self, logits: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> Tensor:
        """Compute Σ w_y (1 - p)^γ · -log p over the terms of each example, ``(batch,)``."""
        gamma = self.recipe.imbalance.focal_gamma
        if class_weights is None and not gamma:
            return self.losses(logits, labels)[0]
        losses = focal(self.term_losses(logits, labels), gamma)
        if class_weights is not None:
            losses = losses * self.term_weights(labels, class_weights)
        return losses.flatten(1).sum(dim=1) if losses.ndim > 1 else losses

    def loss_divisor(self, labels: Tensor, class_weights: Tensor | None) -> float:
        if class_weights is None:
            return self.count_terms(labels)
        return float(self.term_weights(labels, class_weights).double().sum())


def focal(losses: Tensor, gamma: float) -> Tensor:
    """Compute (1 - p)^γ · -log p from losses -log p (Lin et al., ICCV 2017)."""
    if not gamma:
        return losses
    # For γ < 1 the slope of the power is infinite at p = 1.
    smallest = torch.finfo(losses.dtype).tiny
    return (-torch.expm1(-losses)).clamp_min(smallest) ** gamma * losses


def check_class_weights(recipe: TaskRecipe, labels: Sequence[str]) -> None:
    """Raise ``RecipeError`` if ``task.class_weights`` names a label that the data do not have."""
    given = recipe.imbalance.class_weights
    for name in given if isinstance(given, dict) else ():
        if name not in labels:
            raise RecipeError(f"task.class_weights: {unknown_label(name, labels)}")

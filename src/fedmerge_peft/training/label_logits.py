"""Offsets that one client adds to the logits in its training loss, computed from its labels."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.schema import Logits
from fedmerge_peft.tasks.base import Examples


def label_offset(logits: Logits, counts: Tensor) -> Tensor | None:
    """Compute μ, which a client adds to the logits z of its training loss, CE(z + μ).

    With n_c training examples of label c, and n in total:

    restricted:  μ_c = 0 if n_c > 0, else −∞
    adjusted:    μ_c = log(n_c / n)

    FedRS (Li & Zhan, KDD 2021) scales the logits of missing labels; ``restricted`` removes them.
    ``adjusted`` is the balanced softmax (Ren et al. 2020, arXiv 2007.10740).

    Args:
        logits: Value of ``training.logits``.
        counts: n_c, ``(classes,)``.

    Returns:
        μ, ``(classes,)`` float32; None for plain logits.
    """
    match logits:
        case "plain":
            return None
        case "restricted":
            return torch.where(counts > 0, 0.0, -torch.inf)
        case "adjusted":
            return (counts.double() / counts.sum()).log().float()


def client_offset(logits: Logits, examples: Examples, rows: Indices, classes: int) -> Tensor | None:
    """Compute ``label_offset`` for a client with these training examples.

    Args:
        logits: Value of ``training.logits``, or the strategy's value (``Train.logits``).
        examples: The encoded table.
        rows: The client's rows of the table.
        classes: Number of labels of the task.

    Raises:
        RecipeError: ``logits`` is not plain, and the examples do not have one label each.
    """
    if logits == "plain":
        return None
    labels = [examples.columns["labels"][row] for row in rows.tolist()]
    if classes == 0 or any(label.ndim for label in labels):
        raise RecipeError(
            f"training.logits: {logits} needs a task with one label per example; use plain or, if "
            "the strategy is fedrod, another strategy"
        )
    return label_offset(logits, torch.bincount(torch.stack(labels), minlength=classes))

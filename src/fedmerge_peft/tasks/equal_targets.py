"""Warning of training examples from which nothing can be learned, as all have the same target."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge_peft.tasks.text_generation import IGNORED

logger = logging.getLogger(__name__)


def warn_of_equal_targets(targets: Sequence[Tensor], task: str) -> None:
    """Log a warning if all examples have the same target, or all words the same tag.

    Single integers are not compared: classes are checked when the data are loaded
    (``federate_data``), and the number of the right choice may be the same in all examples.

    Args:
        targets: Target of each training example; -100 marks positions without a loss.
        task: Name of the task.
    """
    if len(targets) > 1 and (_equal(targets) or _of_one_value(targets)):
        logger.warning(
            "task: all training examples of %s have the same target, so there is nothing to learn; "
            "check the columns that the section task names, and data.filter",
            task,
        )


def _equal(targets: Sequence[Tensor]) -> bool:
    if targets[0].ndim == 0 and not targets[0].is_floating_point():
        return False
    return all(torch.equal(target, targets[0]) for target in targets)


def _of_one_value(targets: Sequence[Tensor]) -> bool:
    """Return True if tags, of any number of words, are all the same."""
    if targets[0].ndim != 1 or targets[0].is_floating_point():
        return False
    values: set[int] = set()
    for target in targets:
        values |= set(target[target != IGNORED].tolist())
        if len(values) > 1:
            return False
    return True

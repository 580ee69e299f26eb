"""Division of batches into parts that may share a pass of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedmerge_peft.tasks.base import Examples, Padding


def split_batch(padding: Padding, examples: Examples, indices: NDArray[Any]) -> list[NDArray[Any]]:
    """Split a batch into parts whose examples may share a pass of the model.

    Args:
        padding: ``Task.padding``, or ``Task.prompt_padding`` for prompts.
        examples: Encoded examples or prompts.
        indices: Examples of the batch, ``(n,)``.

    Returns:
        Indices of the examples of each part. Parts are in the order of their first examples.
    """
    if padding in ("right", "left"):
        return [indices]
    lengths = examples.lengths[indices] if padding == "none" else np.arange(len(indices))
    return [indices[lengths == length] for length in dict.fromkeys(lengths.tolist())]

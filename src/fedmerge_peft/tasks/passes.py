"""Division of batches into parts that may share a pass of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedmerge_peft.tasks.base import Examples, Padding


def split_batch(padding: Padding, examples: Examples, indices: NDArray[Any]) -> list[NDArray[Any]]:
    """Split a batch into parts, in order; the examples of a part may share a pass of the model."""
    if padding in ("right", "left"):
        return [indices]
    lengths = examples.lengths[indices] if padding == "none" else np.arange(len(indices))
    return [indices[lengths == length] for length in dict.fromkeys(lengths.tolist())]

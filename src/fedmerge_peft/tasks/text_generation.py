"""Base of tasks that generate text: completions, references, losses of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.tasks.generation import TextGenerator
from fedmerge_peft.tasks.passes import split_batch
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.tokenization import as_bytes, from_bytes

IGNORED = -100
"""Label of a position without a loss."""
DEFAULT_LENGTH = 1024
"""Maximum length in tokens if the recipe sets none, and the model has no limit or a larger one."""


class TextGeneration(Task):
    """Task whose predictions are generated texts.

    Examples that are completed have the column ``prompt`` and, if a metric compares the completions
    with references, the column ``reference``.
    """

    completes: ClassVar[bool] = True
    _generator: TextGenerator

    def complete(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> list[str]:
        """Complete prompts, up to an end-of-sequence token, a stop string or ``max_new_tokens``.

        Sampling is seeded with the indices.

        Args:
            model: Model in evaluation mode.
            examples: Output of ``encode`` or ``encode_prompts``.
            indices: Indices of the prompts in ``examples``.
            device: Device of the model.

        Returns:
            Completions without surrounding whitespace.
        """
        prompts = Examples({"prompt": [examples.columns["prompt"][row] for row in indices]})
        order = np.arange(len(indices))
        texts: dict[int, str] = {}
        for part in split_batch(self.prompt_padding, prompts, order):
            completed = self._generator.complete(
                model, self._prompts_on(device, examples, indices[part]), indices[part].tolist()
            )
            texts |= dict(zip(part.tolist(), completed, strict=True))
        return [texts[row] for row in order.tolist()]

    def stream(
        self, model: Any, examples: Examples, on_text: Callable[[str], None], device: torch.device
    ) -> str:
        return self._generator.stream(
            model, self._prompts_on(device, examples, np.zeros(1, dtype=int)), on_text
        )

    def next_logits(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> Tensor:
        return self._generator.first_logits(model, self._prompts_on(device, examples, indices))

    def _prompts_on(self, device: torch.device, examples: Examples, indices: NDArray[Any]) -> Batch:
        prompts = self.collate_prompts(examples, indices)
        return {name: tensor.to(device) for name, tensor in prompts.items()}

    def generate(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> tuple[list[str], list[str]]:
        """Return completions and references, without surrounding whitespace."""
        held = examples.columns["reference"]
        references = [from_bytes(held[index]).strip() for index in indices]
        return self.complete(model, examples, indices, device), references


def as_references(texts: Sequence[str]) -> dict[str, Sequence[Tensor]]:
    """Return the column ``reference`` of encoded examples: the bytes of texts."""
    return {"reference": as_bytes(texts)}


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of each sequence, in nats, over positions whose target is not -100.

    Args:
        logits: Logits of all positions, ``(batch, length, vocabulary)``. Alternatively, for the n
            positions with a target only: their logits ``(n, vocabulary)`` or their cross-entropies
            ``(n,)``.
        targets: ``(batch, length)``.

    Returns:
        Sums and numbers of terms, both float32 ``(batch,)``.
    """
    inside = targets != IGNORED
    if logits.ndim == 1:
        terms = logits
    else:
        scores = _inside(logits, inside).float()
        terms = functional.cross_entropy(scores, targets[inside], reduction="none")
    by_position = terms.new_zeros(targets.shape).masked_scatter(inside, terms)
    return by_position.sum(dim=1), inside.sum(dim=1).float()


def likely_tokens(logits: Tensor, targets: Tensor) -> Mapping[str, Compared]:
    """Return the most likely token and the target at each position whose target is not -100.

    Arguments are those of ``token_losses``, but logits cannot be cross-entropies.
    """
    inside = targets != IGNORED
    predicted = _inside(logits, inside).argmax(dim=-1)
    return {"tokens": (predicted.tolist(), targets[inside].tolist())}


def _inside(logits: Tensor, inside: Tensor) -> Tensor:
    return logits[inside] if logits.ndim == 3 else logits

"""Greedy generation, without the sampling settings that models come with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.tasks.base import Batch


@torch.no_grad()
def generate_tokens(
    model: Any, prompts: Batch, *, pad: int, ends: list[int], max_new_tokens: int, **options: Any
) -> Any:
    """Complete prompts greedily, up to an end token or ``max_new_tokens``.

    Args:
        model: Model in evaluation mode.
        prompts: ``input_ids`` and ``attention_mask``, ``(batch, longest)``, on the model's device.
        pad: Padding id.
        ends: End tokens.
        max_new_tokens: Largest number of new tokens.
        options: Further settings of ``GenerationConfig``.

    Returns:
        The output of ``model.generate``: prompts and new tokens ``(batch, length)``, by default.
    """
    from transformers import GenerationConfig

    # These override the settings of the model's generation_config.json.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends or None,
        **options,
    )
    return model.generate(**prompts, generation_config=settings)


def first_logits(model: Any, prompts: Batch, *, pad: int, ends: list[int]) -> Tensor:
    """Return the logits of the first two generated tokens, ``(batch, 2, vocabulary)``."""
    output = generate_tokens(
        model,
        prompts,
        pad=pad,
        ends=ends,
        max_new_tokens=2,
        min_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1)

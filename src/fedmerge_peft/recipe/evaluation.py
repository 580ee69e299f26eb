"""Sections of the evaluation, and of what clients are served with."""

from __future__ import annotations

from typing import Literal

from fedmerge_peft.recipe.section import BatchSize, Boolean, Count, Section


class EvaluationRecipe(Section):
    """Evaluation during a run."""

    batch_size: BatchSize = 64
    """Examples per batch in evaluation."""
    every: Count = 1
    """Evaluate in every n-th round, and in the first and last."""
    finetuned: Boolean = True
    """Also evaluate the locally trained adapters. The difference is the gain of local finetuning,
    which is small if the merged adapters fit their clients."""
    serve: Literal["last", "best"] = "last"
    """Round whose adapters and scores are the result of the run: the last one, or the one with the
    lowest mean validation loss over all clients. best needs validation examples, and all clients in
    each round."""


class ServingRecipe(Section):
    """Adapters that clients are served with."""

    label_prior: Boolean = False
    """Add the logarithm of a client's label frequencies to the logits of its served adapter,
    relative to the frequencies at all clients; with `training.logits: adjusted`, relative to equal
    frequencies. It is part of the head's bias, so that exported adapters have it. It requires a
    classifier with a bias and, at the server, the clients' label counts, which `privacy` rules
    out. The adapters that clients train do not have it."""

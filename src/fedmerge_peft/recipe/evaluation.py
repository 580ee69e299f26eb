"""Sections of the evaluation, and of the served adapters."""

from __future__ import annotations

from typing import Literal

from fedmerge_peft.recipe.section import BatchSize, Boolean, Count, Section


class EvaluationRecipe(Section):
    """Evaluation during a run."""

    batch_size: BatchSize = 64
    """Examples per batch in evaluation."""
    clients_per_batch: Count | Literal["auto"] = "auto"
    """Largest number of clients that are evaluated in one forward pass, each with its own adapter.
    Clients share a pass only if their number times the largest number of their evaluation examples
    is at most `batch_size`. Up to rounding, the scores equal those of separate passes. auto: 16 on
    a CUDA GPU, otherwise 1, because on a CPU only clients with few examples gain."""
    every: Count = 1
    """Evaluate in every n-th round, and in the first and last."""
    finetuned: Boolean = True
    """Also evaluate each client's adapter after its local training. The difference between its
    score and the served adapter's score is the gain of local finetuning, which is small if merged
    adapters fit their clients."""
    serve: Literal["last", "best"] = "last"
    """Round whose adapters and scores are the result of the run. last: the last round. best: the
    round with the lowest mean validation loss over all clients; it requires validation examples
    and `clients.fraction: 1`, and `privacy` rules it out."""


class ServingRecipe(Section):
    """Changes to the served adapters."""

    label_prior: Boolean = False
    """Add a label prior to the logits of the served adapters: the logarithm of a client's label
    frequencies relative to those of all clients together or, with `training.logits: adjusted`,
    relative to equal frequencies. The prior is added to the head's bias, so exported adapters
    contain it; the adapters that clients train do not. The prior requires a classifier with a bias,
    and the clients' label counts at the server, which `privacy` rules out."""

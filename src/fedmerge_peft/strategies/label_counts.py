"""Label distributions of clients, estimated from their counts of training examples by label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def fit_concentration(counts: Tensor, others: Tensor) -> tuple[float, float]:
    """Estimate how similar the label distributions of clients are.

    A Dirichlet-multinomial distribution around the label distribution p̄_i of the other clients
    predicts client i's labels, with one concentration a for all clients:

        p_i(c) = (n_ic + a p̄_ic) / (n_i + a),    n_i = Σ_c n_ic

    The estimate of a maximizes the leave-one-out likelihood: each example is predicted from the
    client's other examples.

    Args:
        counts: n, training examples of each client by label, ``(m, classes)`` float64; at least one
            for each client.
        others: For each client, the counts of the other clients by label, ``(m, classes)`` float64.
            p̄_i is estimated from them.

    Returns:
        a, and its gain in log-likelihood (nats) over equal distributions of all clients. a is
        infinite if the gain is at most the logarithm of the number of examples, as in the Bayesian
        information criterion with two parameters.
    """
    size, amount = counts.sum(dim=1, keepdim=True), others.sum(dim=1, keepdim=True)
    mean = smoothed_distribution(others)

    def likelihood(a: Tensor | float) -> float:
        predicted = ((counts - 1).clamp_min(0) + a * mean) / (size - 1 + a)
        return float((counts * predicted.log()).sum())

    grid = torch.logspace(-1, 5, 61, dtype=torch.float64).tolist()
    best = max(grid, key=likelihood)
    gain = likelihood(best) - likelihood(amount)
    differ = gain > math.log(float(counts.sum()))
    return (best if differ else math.inf), max(gain, 0.0)


def smoothed_distribution(counts: Tensor) -> Tensor:
    """Compute label frequencies ``(..., classes)``, with half an example spread over all labels.

    A label without examples therefore has a positive frequency.
    """
    counts = counts.double()
    classes = counts.shape[-1]
    return (counts + 0.5 / classes) / (counts.sum(dim=-1, keepdim=True) + 0.5)


@dataclass(frozen=True)
class LabelPriors:
    """Estimates from which the label distributions of present and new clients follow."""

    mean: Tensor
    """p̄, the label distribution of all clients together, ``(classes,)`` float64."""
    concentration: float
    """a, from ``fit_concentration``; infinite if clients have one distribution."""

    @classmethod
    def fit(cls, counts: Tensor) -> Self:
        """Estimate p̄ and a.

        Args:
            counts: Training examples of each client by label, ``(m, classes)``. A row of zeros
                means that the client's counts are not known yet.
        """
        counts = counts.double()
        total = counts.sum(dim=0)
        known = counts[(counts.sum(dim=1) > 0) & (counts.sum(dim=1) < total.sum())]
        concentration = fit_concentration(known, total - known)[0] if len(known) else math.inf
        return cls(smoothed_distribution(total), concentration)

    def shifts(self, counts: Tensor, *, balanced: bool) -> Tensor:
        """Compute the terms that add the clients' label priors to the logits of a classifier.

        The prior of a client with counts n_c, n = Σ_c n_c, is

            p̂_c = (n_c + a p̄_c) / (n + a)

        A classifier that was trained on all clients' examples has learned p̄, so the shift is
        log p̂ − log p̄. A classifier that was trained with adjusted logits has learned no
        frequencies, so the shift is log p̂.

        Args:
            counts: n_c, ``(k, classes)``. A client without examples has the prior p̄.
            balanced: True if the classifier was trained with ``training.logits: adjusted``.

        Returns:
            The shifts, ``(k, classes)`` float32.
        """
        n, size = counts.double(), counts.double().sum(dim=1, keepdim=True)
        if math.isinf(self.concentration):
            prior = self.mean.expand_as(n)
        else:
            prior = (n + self.concentration * self.mean) / (size + self.concentration)
        return (prior.log() if balanced else prior.log() - self.mean.log()).float()

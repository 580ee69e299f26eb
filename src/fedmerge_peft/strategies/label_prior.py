"""Add each client's label prior to the head's bias in the adapter that the client is served."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.adapters.soup import AdapterSoup, OwnParts
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.strategies.base import Strategy, StrategyContext
from fedmerge_peft.strategies.label_counts import LabelPriors
from fedmerge_peft.strategies.wrapping import WrappedStrategy
from fedmerge_peft.training.plan import Mixture, Served


class LabelPrior(WrappedStrategy):
    """Wrapper of any strategy that adds label priors to the logits z_i of served adapters:

        z_i(x) + log p̂_i − log p̄    (z_i(x) + log p̂_i if ``balanced``)

    ``LabelPriors.shifts`` describes the estimates p̂_i and p̄. The sum is exact, because the
    logarithms are added to the bias of the head's last layer. In the soup, the logarithms are own
    parts of the clients' adapters, so the exported adapter of a client contains them. Clients train
    adapters without the priors.
    """

    def __init__(self, inner: Strategy, context: StrategyContext, *, balanced: bool) -> None:
        """Wrap a strategy.

        Args:
            inner: The strategy to wrap.
            context: Context of this strategy, with label counts.
            balanced: As in ``LabelPriors.shifts``.

        Raises:
            RecipeError: There are no label counts, or the adapter's head is unsuitable
                (``bias_columns``).
        """
        super().__init__(inner)
        self.trains_what_it_serves = False
        if context.label_counts is None:
            raise RecipeError(
                "serving.label_prior: this federation has no label counts; remove the key"
            )
        self.columns = bias_columns(context.layout, context.label_counts.shape[1])
        shifts = LabelPriors.fit(context.label_counts).shifts(
            context.label_counts, balanced=balanced
        )
        self.own = OwnParts(self.columns, shifts)

    @property
    def soup(self) -> AdapterSoup:
        """Soup of the wrapped strategy, with the priors as own parts of the clients' adapters."""
        inner = self.inner.soup
        return replace(inner, own=self.own if inner.own is None else inner.own.plus(self.own))

    @soup.setter
    def soup(self, soup: AdapterSoup) -> None:
        self.inner.soup = replace(self.inner.soup, rows=soup.rows, base=soup.base)

    def served(self, client: int) -> Served:
        served = self.inner.served(client)
        if isinstance(served, Mixture):
            return replace(served, rows=self._shifted(served.rows, client))
        return self._shifted(served, client)

    def adapter(self, client: int) -> Tensor:
        return self._shifted(self.inner.adapter(client), client)

    def _shifted(self, rows: Tensor, client: int) -> Tensor:
        """Return a copy of rows ``(P,)`` or ``(k, P)`` with the client's prior added."""
        rows = rows.clone()
        rows[..., self.columns] += self.own.residuals[client]
        return rows


def bias_columns(layout: AdapterLayout, classes: int) -> Tensor:
    """Return the columns of the bias of the head's last layer, ``(classes,)`` int64.

    Raises:
        RecipeError: The adapter's head has no matrix, or there is no head. The head's last layer
            has no bias, or its number of rows differs from ``classes``.
    """
    matrix, bias = layout.classifier, layout.classifier_bias
    if matrix is None:
        reason = "this adapter has no output layer to add the prior to"
    elif matrix.shape[0] != classes:
        reason = (
            f"the head ends in {matrix.key} with {matrix.shape[0]} rows, but there are {classes} "
            "labels"
        )
    elif bias is None:
        reason = f"the last layer of the head ({matrix.key}) has no bias to add the prior to"
    else:
        return torch.arange(bias.offset, bias.offset + bias.size)
    raise RecipeError(f"serving.label_prior: {reason}; remove the key")

"""FedEM: a mixture of adapters for each client, by expectation-maximisation (Marfoq et al. 2021, arXiv 2108.10252)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters import merging_weights
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack
from fedmerge_peft.training.plan import Mixture


class FedEM(Strategy):
    """p_i(y | x) = Σ_k π_ik p(y | x; Θ_k). Components are common, π_i is the client's; each round is a step of EM:

    client:  E and M of ``training/execute.py`` on its own examples give π_i and θ_ik, trained from Θ_k
    server:  Θ_k ← Σ_i ρ_i θ_ik,  ρ_i = n_i / n over the clients that replied

    All components travel both ways. They start independent, since equal ones would stay equal; as long as LoRA's B = 0 they differ by
    their random heads alone, or where there is no head, by what A makes of the first gradient.

    A mixture of what adapters predict is no adapter: it costs as many forward passes as it has components. For texts, the posterior of
    a component is that of the whole completion, and predictions are mixed token by token with π.
    """

    state_fields = ("_weights",)
    learns_weights = True

    def __init__(self, recipe: recipes.FedEMRecipe, context: StrategyContext) -> None:
        rows = torch.stack([context.fresh_row(number) for number in range(recipe.adapters)])
        if recipe.adapters > 1 and bool((rows == rows[0]).all()):
            raise RecipeError(
                ["strategy: fedem's components would start equal and so stay equal: with lora.merge=shared_a and no head, an adapter is B "
                 "alone, which starts at zero; use lora.merge=factor"]
            )  # fmt: skip
        self.soup = AdapterSoup(rows, context.layout, context.shared)
        self._weights = torch.full((context.clients, recipe.adapters), 1 / recipe.adapters)

    @property
    def weights(self) -> Tensor:
        return self._weights

    def plan(self, client: int) -> Mixture:
        return Mixture(self.soup.rows, self._weights[client])

    def served(self, client: int) -> Mixture:
        return self.plan(client)

    def traffic(self, client: int) -> tuple[int, int]:
        return self.soup.rows.numel(), self.soup.rows.numel()

    def update(self, replies: Iterable[Reply]) -> None:
        ordered = sorted(replies, key=lambda reply: reply.client)
        _, _, sizes = stack(ordered)
        deltas = torch.stack([reply.deltas for reply in ordered])  # (clients, components, P)
        deltas = self.aggregator.clip(deltas.flatten(1)).view_as(deltas)
        alike = torch.ones(len(ordered), 1)
        self.soup.rows = self.soup.rows - torch.cat(
            [self.aggregator.combine(component, alike, sizes) for component in deltas.unbind(1)]
        )
        weights = self._weights.clone()
        for reply in ordered:
            if reply.weights is not None:
                weights[reply.client] = reply.weights
        self._weights = weights

    def warnings(self) -> list[str]:
        return merging_weights.unused_warning(self._weights)

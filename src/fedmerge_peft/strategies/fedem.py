"""FedEM: a mixture of adapters for each client, trained by expectation-maximization.

Source: Marfoq et al. 2021, arXiv 2108.10252.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters import merging_weights
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack_replies
from fedmerge_peft.training.plan import Mixture


class FedEM(Strategy):
    """Mixture p_i(y | x) = Σ_k π_ik p(y | x; Θ_k) of common components with π_i for each client.

    Each round is one EM step:

    client:  π_i, and θ_ik from Θ_k, by steps E and M of ``training.plan.Mixture`` on its examples
    server:  Θ_k ← Σ_i ρ_i θ_ik,  ρ_i = n_i / n over the clients that replied

    All components travel in both directions. They start from independent random numbers, because
    equal components stay equal. While LoRA's B = 0, components differ only in their random heads.
    Without a head, they differ only in the effect of A on the first gradient.

    A mixture of predictions is not an adapter. It requires one forward pass for each component. For
    texts, each completion has one posterior over the components, and predictions are mixed token by
    token with π.
    """

    state_fields = ("_weights",)
    learns_weights = True

    def __init__(self, recipe: recipes.FedEMRecipe, context: StrategyContext) -> None:
        rows = torch.stack([context.fresh_row(number) for number in range(recipe.adapters)])
        if recipe.adapters > 1 and bool((rows == rows[0]).all()):
            raise RecipeError(
                "strategy: fedem's components would start and remain equal, because no parameter "
                "of this adapter starts at random; adapt layers with LoRA and lora.merge=factor, "
                "which trains LoRA's random factor"
            )
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
        _, _, sizes = stack_replies(ordered)
        deltas = torch.stack([reply.deltas for reply in ordered])  # (clients, components, P)
        deltas = self.aggregator.clip(deltas.flatten(1)).view_as(deltas)
        ones = torch.ones(len(ordered), 1)
        self.soup.rows = self.soup.rows - torch.cat(
            [self.aggregator.combine(component, ones, sizes) for component in deltas.unbind(1)]
        )
        weights = self._weights.clone()
        for reply in ordered:
            if reply.weights is not None:
                weights[reply.client] = reply.weights
        self._weights = weights

    def warnings(self) -> list[str]:
        return merging_weights.unused_warning(self._weights)

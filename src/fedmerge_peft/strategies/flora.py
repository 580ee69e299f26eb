"""FLoRA: stacked factors, added to the backbone.

Source: Wang et al. 2024, arXiv 2409.05976.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import LayerFactors, update_inner_product
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack_replies
from fedmerge_peft.strategies.heterogeneous_ranks import HeterogeneousRanks


class FLora(HeterogeneousRanks):
    """In each round clients train fresh factors, with B_i = 0 and A_i random.

    The stacked factors of all clients form one adapter of rank Σ_i r_i, whose update is

        ΔW ← ΔW + s Σ_i ρ_i B_i A_i = ΔW + s [ρ_1 B_1 … ρ_m B_m] [A_1; …; A_m]

    It has none of the cross terms that averaging A and B introduces. s is the slot's scaling, and
    ρ_i = n_i / n over the clients that replied. ΔW is added to the backbone of all clients. The
    next round starts from fresh factors, which follow from the seed and are the same for all
    clients. Heads and all other parameters that are not factors are averaged and kept.

    A client is sent the head and all stacks that it has not received yet. If it took part in the
    previous round, that is one stack. It returns its factors and head.

    W + ΔW is rounded to the backbone's number format. ΔW itself, and the adapter that a run saves,
    are float32.
    """

    state_fields = (*HeterogeneousRanks.state_fields, "_round", "_owed")

    def __init__(self, recipe: recipes.FLoraRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        if embeddings := [layer.module for layer in self.factors if layer.embedding]:
            raise RecipeError(
                [
                    "lora.target_modules: flora supports linear layers only, "
                    f"but {embeddings[0]} is an embedding; remove it"
                ]
            )
        shapes = {layer.module: (layer.b.shape[0], layer.a.shape[1]) for layer in self.factors}
        self.soup.base = {module: torch.zeros(shape) for module, shape in shapes.items()}
        self._round = 0
        self._owed = torch.zeros(context.clients, dtype=torch.int64)
        """Number of values in the stacks that each client has not received yet, ``(m,)`` int64."""
        self._added: dict[str, tuple[tuple[Tensor, Tensor], float]] = {}
        """Stacked factors A and B of the last round, and ‖B A‖_F², by module name."""

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack_replies(replies)
        shares = sizes / sizes.sum()
        trained = self.soup.rows[self.assigned[clients]] - deltas
        base = dict(self.base)
        for layer in self.factors:
            factors = [layer.split(client_row) for client_row in trained.double()]
            b = torch.cat([share * b for share, (_, b) in zip(shares, factors, strict=True)], dim=1)
            a = torch.cat([a for a, _ in factors])
            self._added[layer.module] = (a.float(), b.float()), update_inner_product((a, b), (a, b))
            base[layer.module] = (
                base[layer.module] + (self.context.scaling[layer.module] * b @ a).float()
            )
        self._round += 1
        row = torch.where(
            self.plain, shares.to(trained) @ trained, self.context.fresh_row(self._round)
        )
        self.soup = self._soup(row)
        self.soup.base = base
        self._owed[clients] = 0
        self._owed += sum(self._factors_size(int(client)) for client in clients)

    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        return self._added[layer.module]

    def traffic(self, client: int) -> tuple[int, int]:
        plain = int(self.plain.sum())
        return int(self._owed[client]) + plain, self._factors_size(client) + plain

    def _factors_size(self, client: int) -> int:
        return self.adapter_size(client) - int(self.plain.sum())

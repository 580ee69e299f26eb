"""FLoRA: stacked factors, added to the backbone (Wang et al. 2024, arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import LayerFactors, update_inner_product
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack
from fedmerge_peft.strategies.heterogeneous_ranks import Ranked


class FLora(Ranked):
    """Each round clients train fresh factors, B_i = 0 and A_i random. Stacked, theirs are one adapter of rank Σ_i r_i, whose update

        ΔW ← ΔW + s Σ_i ρ_i B_i A_i = ΔW + s [ρ_1 B_1 … ρ_m B_m] [A_1; …; A_m]

    has none of the cross terms that averaging A and B brings; s is the slot's scaling, ρ_i = n_i / n over the clients that
    replied. ΔW is added to everyone's backbone, and the next round starts from fresh factors, drawn from the seed and the same for all
    clients. Heads, and what else does not belong to the factors, are averaged and go on.

    A client is sent the stacks that it has not had yet (after a round in which it took part, that round's) and the head; it returns
    its own factors and head.

    W + ΔW is rounded to the backbone's number format; ΔW itself, and the adapter that a run saves, are float32.
    """

    state_fields = (*Ranked.state_fields, "_round", "_owed")

    def __init__(self, recipe: recipes.FLoraRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        if embeddings := [layer.module for layer in self.factors if layer.embedding]:
            raise RecipeError(
                [
                    f"lora.target_modules: flora adds to linear layers, and {embeddings[0]} is an embedding; leave it out"
                ]
            )
        shapes = {layer.module: (layer.b.shape[0], layer.a.shape[1]) for layer in self.factors}
        self.soup.base = {module: torch.zeros(shape) for module, shape in shapes.items()}
        self._round = 0
        self._owed = torch.zeros(context.clients, dtype=torch.int64)
        self._added: dict[str, tuple[tuple[Tensor, Tensor], float]] = {}
        """The last round's stacked factors A and B, and ‖B A‖_F², by module name."""

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack(replies)
        shares = sizes / sizes.sum()
        trained = self.soup.rows[self.assigned[clients]] - deltas
        base = dict(self.base)
        for layer in self.factors:
            each = [layer.split(one) for one in trained.double()]
            b = torch.cat([share * b for share, (_, b) in zip(shares, each, strict=True)], dim=1)
            a = torch.cat([a for a, _ in each])
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
        self._owed += sum(self._held_factors(int(client)) for client in clients)

    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        return self._added[layer.module]

    def traffic(self, client: int) -> tuple[int, int]:
        plain = int(self.plain.sum())
        return int(self._owed[client]) + plain, self._held_factors(client) + plain

    def _held_factors(self, client: int) -> int:
        return self.held(client) - int(self.plain.sum())

"""FLoRA and FedEx-LoRA: the server adds updates of higher rank to the backbone's weights."""

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
    """Each client trains fresh factors in each round, starting from B_i = 0 and a random A_i.

    The stacked factors of all clients form one adapter of rank Σ_i r_i. The server adds the
    update of this adapter to ΔW:

        ΔW ← ΔW + s Σ_i ρ_i B_i A_i = ΔW + s [ρ_1 B_1 … ρ_m B_m] [A_1; …; A_m]

    The sum has none of the cross terms that averaging A and B introduces. s is LoRA's scaling,
    and ρ_i = n_i / n over the clients that replied. ΔW is added to the backbone of all clients. The
    next round starts from fresh factors, which follow from the seed and are the same for all
    clients. Heads and all other parameters that are not factors are averaged and kept.

    A client is sent all stacks that it has not received yet, and the parameters that are not
    factors. A client that took part in the previous round thus receives one stack. A client returns
    its factors and the other parameters.

    W + ΔW is rounded to the backbone's number format. ΔW itself, and the adapter that a run saves,
    are float32. Source: Wang et al. 2024, arXiv 2409.05976.
    """

    state_fields = (*HeterogeneousRanks.state_fields, "_round", "_owed")

    def __init__(
        self, recipe: recipes.FLoraRecipe | recipes.FedExLoraRecipe, context: StrategyContext
    ) -> None:
        super().__init__(recipe, context)
        if embeddings := [layer.module for layer in self.factors if layer.embedding]:
            raise RecipeError(
                f"lora.target_modules: {recipe.name} supports linear layers only, "
                f"but {embeddings[0]} is an embedding; remove it"
            )
        shapes = {layer.module: (layer.b.shape[0], layer.a.shape[1]) for layer in self.factors}
        self.soup.base = {module: torch.zeros(shape) for module, shape in shapes.items()}
        self._round = 0
        self._owed = torch.zeros(context.clients, dtype=torch.int64)
        """Number of values in the stacks that each client has not received yet, ``(m,)`` int64."""
        self._added: dict[str, tuple[tuple[Tensor, Tensor], float]] = {}
        """Stacked factors A and B of the last round and ‖B A‖_F², by module name."""

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack_replies(replies)
        shares = sizes / sizes.sum()
        trained = self.soup.rows[self.assigned[clients]] - deltas
        self._round += 1
        mean = shares.to(trained) @ trained
        row = torch.where(self.plain, mean, self.next_factors(mean))
        base = dict(self.base)
        for layer in self.factors:
            factors = [layer.split(client_row) for client_row in trained.double()]
            b = torch.cat([share * b for share, (_, b) in zip(shares, factors, strict=True)], dim=1)
            a = torch.cat([a for a, _ in factors])
            self._added[layer.module] = (a.float(), b.float()), update_inner_product((a, b), (a, b))
            next_a, next_b = layer.split(row.double())
            scaling = self.context.scaling[layer.module]
            base[layer.module] = (
                base[layer.module] + (scaling * b @ a - scaling * next_b @ next_a).float()
            )
        self.soup = self._soup(row)
        self.soup.base = base
        self._owed[clients] = 0
        self._owed += self.stack_size([self._factors_size(int(client)) for client in clients])

    def next_factors(self, mean: Tensor) -> Tensor:
        """Return a row ``(P,)`` that contains the initial factors of the next round.

        Args:
            mean: Σ_i ρ_i θ_i of the clients' trained adapters, ``(P,)``.
        """
        return self.context.fresh_row(self._round)

    def stack_size(self, sizes: list[int]) -> int:
        """Return the number of values in the factors of the update that a round adds to ΔW.

        Args:
            sizes: Number of values in the factors of each client that replied.
        """
        return sum(sizes)

    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        return self._added[layer.module]

    def traffic(self, client: int) -> tuple[int, int]:
        plain = int(self.plain.sum())
        return int(self._owed[client]) + plain, self._factors_size(client) + plain

    def _factors_size(self, client: int) -> int:
        return self.adapter_size(client) - int(self.plain.sum())


class FedExLora(FLora):
    """FedAvg of A and B, with the error of this average added to the backbone:

        A ← Σ_i ρ_i A_i,    B ← Σ_i ρ_i B_i,    ΔW ← ΔW + s (Σ_i ρ_i B_i A_i − B A)

    s is LoRA's scaling, and ρ_i = n_i / n over the clients that replied. W + ΔW + s B A is
    therefore the exact mean of the clients' models, and the next round continues from A and B.
    Heads and all other parameters that are not factors are averaged. All clients have the same
    rank r.

    With the averaged A and B, the added matrix is s Σ_i ρ_i (B_i − B) (A_i − A). For k clients its
    rank is at most (k − 1) r, and it is sent as factors of this rank. A client is sent the adapter
    and all such factors that it has not received yet. It returns its adapter.

    Source: Singhal et al. 2025, arXiv 2410.09432, which weights all clients equally.
    """

    def next_factors(self, mean: Tensor) -> Tensor:
        return mean

    def stack_size(self, sizes: list[int]) -> int:
        return sum(sizes[1:])

    def traffic(self, client: int) -> tuple[int, int]:
        size = self.adapter_size(client)
        return int(self._owed[client]) + size, size

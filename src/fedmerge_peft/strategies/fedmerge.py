"""FedMerge: a soup of adapters, and for each client the weights to merge them with (arXiv 2504.06768)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft import recipe
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.adapters.weights import MergingWeights
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.strategies.base import Reply, Start, Strategy, stack
from fedmerge_peft.strategies.step import fedmerge_step


class FedMerge(Strategy):
    """θ_i = Σ_j softmax(W)_ij Θ_j; ``fedmerge_step`` learns Θ and W from the replies."""

    def __init__(self, recipe: recipe.schema.FedMerge, start: Start) -> None:
        self.recipe = recipe
        numbers = range(recipe.adapters) if recipe.start == "independent" else [0] * recipe.adapters
        self.soup = AdapterSoup(torch.stack([start.fresh_row(number) for number in numbers]), start.layout, start.shared)
        self.merging = MergingWeights.uniform(start.clients, recipe.adapters)
        self._columns = start.layout.columns("head") if recipe.weights_columns == "head" else None
        if self._columns is not None and len(self._columns) == 0:
            raise RecipeError(
                ["strategy.weights_columns: this adapter has no head; use all, or name the head in lora.modules_to_save"]
            )

    @property
    def weights(self) -> Tensor:
        return self.merging.softmax()

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack(replies)
        self.soup.rows, self.merging.logits[clients] = fedmerge_step(
            self.soup.rows,
            self.merging.logits[clients],
            deltas,
            sizes,
            rule=self.recipe.rule,
            weights_lr=self.recipe.weights_lr,
            soup_lr=self.recipe.soup_lr,
            columns=self._columns,
        )

    def state(self) -> dict[str, Tensor]:
        return {"logits": self.merging.logits}

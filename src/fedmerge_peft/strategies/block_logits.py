"""Merging logits by block: FedMerge's step of W and Θ in each block of columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmerge_peft.adapters.blocks import Blocks, BlockWeights
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.strategies.logit_steps import LogitSteps
from fedmerge_peft.strategies.server_step import weights_gradient
from fedmerge_peft.util.stateful import Stateful


class BlockLogits(Stateful):
    """Logits W_ib of each client's merging weights in each block.

    θ_ib = Σ_j π_ijb Θ_jb,    π_ib = softmax(W_ib / T),    G_ijb = π_ijb ⟨Θ_jb − θ_ib, δ_ib⟩

    Each block takes FedMerge's step, computed from its columns only. With the rule ``normalized``,
    the gradient of each client and block is divided by its largest absolute entry.
    """

    state_fields = ("logits", "steps")

    def __init__(
        self,
        recipe: recipes.FedMergeRecipe,
        context: StrategyContext,
        blocks: Blocks,
        logits: Tensor,
    ) -> None:
        """Start with the same logits in all blocks.

        Args:
            recipe: Recipe of the strategy.
            context: Context of the strategy.
            blocks: Partition of the columns into B blocks.
            logits: W, ``(m, d)``.
        """
        self.blocks = blocks
        self.temperature = recipe.temperature
        self.logits = logits[:, None].repeat(1, len(blocks), 1)
        """W, ``(m, B, d)`` float32."""
        self.steps = LogitSteps(recipe, context, logits.shape[1], len(blocks))

    def set(self, clients: Tensor, first: Callable[[Tensor], Tensor]) -> None:
        """Set the logits of some clients in all blocks.

        Args:
            clients: Client indices, ``(k,)``.
            first: Function from the columns of a block to its logits ``(k, d)``.
        """
        for block, columns in enumerate(self.blocks.columns):
            self.logits[clients, block] = first(columns)

    def weights(self) -> Tensor:
        """Return π, ``(m, B, d)`` float32."""
        return self._softmax(self.logits)

    def mean(self) -> Tensor:
        """Return the mean of π over the columns, ``(m, d)`` float32."""
        return self._mean(self.weights())

    def offsets(self) -> BlockWeights:
        """Return the differences between π and ``mean``, for the soup, which stores them."""
        weights = self.weights()
        return BlockWeights(self.blocks, weights - self._mean(weights)[:, None])

    def merge(self, rows: Tensor, client: int) -> Tensor:
        """Merge the adapter ``(P,)`` of a client from Θ ``(d, P)``."""
        weights = self._softmax(self.logits[client])
        merged = torch.empty_like(rows[0])
        for block, columns in enumerate(self.blocks.columns):
            merged[columns] = weights[block] @ rows[:, columns]
        return merged

    def _softmax(self, logits: Tensor) -> Tensor:
        return torch.softmax((logits / self.temperature).double(), dim=-1).float()

    def _mean(self, weights: Tensor) -> Tensor:
        return torch.einsum("b,mbd->md", self.blocks.shares, weights.double()).float()

    def step(self, rows: Tensor, clients: Tensor, deltas: Tensor, shares: Tensor) -> None:
        """Subtract the steps along G from the logits of some clients, in place.

        Args:
            rows: Θ, ``(d, P)``.
            clients: Client indices, ``(k,)``.
            deltas: δ, ``(k, P)``.
            shares: ρ, ``(k,)`` float64.
        """
        weights, count = self.weights()[clients].double(), len(self.blocks)
        gradient = torch.stack(
            [
                weights_gradient(rows[:, columns], weights[:, block], deltas[:, columns])
                for block, columns in enumerate(self.blocks.columns)
            ],
            dim=1,
        )
        gradient = gradient.flatten(0, 1) / self.temperature  # (k B, d)
        places = (clients[:, None] * count + torch.arange(count)).flatten()
        steps = self.steps.compute(places, gradient, shares.repeat_interleave(count))
        self.logits[clients] -= steps.view(len(clients), count, -1).float()

    def gradient(
        self, clients: Tensor, deltas: Tensor, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Combine the updates of some clients into the gradient of Θ, ``(d, P)``.

        Args:
            clients: Client indices, ``(k,)``.
            deltas: δ, ``(k, P)``.
            combine: Function from updates ``(k, c)`` and π ``(k, d)`` to one update for each
                adapter, ``(d, c)``.
        """
        weights = self.weights()[clients]
        combined = deltas.new_empty(weights.shape[-1], deltas.shape[1])
        for block, columns in enumerate(self.blocks.columns):
            combined[:, columns] = combine(deltas[:, columns], weights[:, block])
        return combined


def make_blocks(recipe: recipes.FedMergeRecipe, context: StrategyContext) -> Blocks | None:
    """Return the blocks of the recipe; None if the recipe has none.

    Raises:
        RecipeError: The recipe asks for robust aggregation or clipping, or all columns form one
            block.
    """
    if recipe.blocks is None:
        return None
    if context.aggregator.recipe.defends:
        raise RecipeError(
            "strategy.blocks: merging by block does not support robust aggregation or clipping; "
            "remove strategy.blocks, or the section robustness"
        )
    try:
        return Blocks.create(recipe.blocks, context.layout)
    except ValueError as error:
        raise RecipeError(
            f"strategy.blocks: {error}; choose another kind, or remove the key"
        ) from error

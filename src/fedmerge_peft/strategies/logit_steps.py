"""Steps of FedMerge's merging logits along their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.strategies.server_step import logits_step
from fedmerge_peft.util.stateful import Stateful

_ADAM_DECAY = 0.9
"""Decay of the running average of G² with ``rule: adam``. It is low, because a federation has few
rounds."""


class LogitSteps(Stateful):
    """Steps of the merging logits W that follow from their gradient ρ G (``server_step.py``).

    The state contains running averages of G and, for ``rule: adam``, of G², each ``(rows, d)``.
    There is one row for each client, or one row for each client and block.
    """

    state_fields = ("average", "squares", "rounds")

    def __init__(
        self,
        recipe: recipes.FedMergeRecipe,
        context: StrategyContext,
        adapters: int,
        blocks: int = 1,
    ) -> None:
        self.recipe = recipe
        head = context.layout.columns("head")
        if recipe.weights_columns == "head" and len(head) == 0:
            reason, remedy = (
                ("the head is private and not merged", "head: shared")
                if recipe.private_head
                else ("this adapter has no head", "name the head in lora.modules_to_save")
            )
            raise RecipeError(f"strategy.weights_columns: {reason}; use all, or {remedy}")
        by_head = recipe.weights_columns == "head" or (
            recipe.weights_columns is None and recipe.rule == "paper" and len(head) > 0
        )
        self.columns = head if by_head else None
        """Indices of the columns that enter the inner product in G; None if all P columns do."""
        self.lr: float = recipe.effective_values()["weights_lr"]
        self.average = torch.zeros(context.clients * blocks, adapters, dtype=torch.float64)
        self.squares = torch.zeros_like(self.average)
        self.rounds = torch.zeros(len(self.average), dtype=torch.int64)

    def compute(self, rows: Tensor, gradient: Tensor, shares: Tensor) -> Tensor:
        """Compute the steps to subtract from these rows of logits, ``(k, d)`` float64.

        The steps use an exponential moving average of G over the rounds in which the row's client
        replied.

        Args:
            rows: Indices of the rows, ``(k,)``.
            gradient: G, ``(k, d)`` float64.
            shares: ρ of the rows' clients, ``(k,)`` float64.
        """
        memory = self.recipe.weights_memory
        self.rounds[rows] += 1
        self.average[rows] = memory * self.average[rows] + (1 - memory) * gradient
        unbiased = self.average[rows] / (1 - memory ** self.rounds[rows, None].double())
        if self.recipe.rule != "adam":
            return logits_step(self.recipe.rule, unbiased, shares, self.lr)
        self.squares[rows] = (
            _ADAM_DECAY * self.squares[rows] + (1 - _ADAM_DECAY) * gradient.square()
        )
        root = (self.squares[rows] / (1 - _ADAM_DECAY ** self.rounds[rows, None].double())).sqrt()
        return self.lr * torch.where(
            root > 0, unbiased / root.clamp_min(torch.finfo(torch.float64).tiny), 0.0
        )

"""A federation of formulas to run strategies in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fedmerge_peft.training.reference import Trained

from fedmerge_peft import AdapterLayout, Federation, Recipe
from fedmerge_peft.recipe.schema import StrategyRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.training.execute import Hands, carry_out

RANK = 4
SHAPES = [
    ("one.lora_A.weight", (RANK, 6), "lora"),
    ("one.lora_B.weight", (7, RANK), "lora"),
    ("two.lora_A.weight", (RANK, 5), "lora"),
    ("two.lora_B.weight", (6, RANK), "lora"),
    ("head.weight", (2, 3), "head"),
]


class Formulas:
    """Clients with ℓ_i(θ) = ½ ‖θ − c_i‖², who find the minimum exactly."""

    def __init__(
        self, clients: int, layout: AdapterLayout | None = None, sizes: list[int] | None = None
    ) -> None:
        self.layout = layout or AdapterLayout.from_tensors(SHAPES)
        self.sizes = sizes or [10] * clients
        self.centres = torch.randn(
            clients, self.layout.size, generator=torch.Generator().manual_seed(7)
        )
        self.shares = torch.tensor(self.sizes) / sum(self.sizes)

    def fresh_row(self, number: int) -> torch.Tensor:
        """Random, with B at zero, as PEFT starts."""
        row = torch.randn(self.layout.size, generator=torch.Generator().manual_seed(number))
        for entry in self.layout.entries:
            if "lora_B" in entry.key:
                row[entry.columns] = 0
        return row

    def strategy(self, name: str, **settings):
        from pydantic import TypeAdapter

        recipe = TypeAdapter(StrategyRecipe).validate_python({"name": name, **settings})
        return make_strategy(recipe, self.strategy_context())

    def strategy_context(self) -> StrategyContext:
        scaling = {
            entry.key.removesuffix(".lora_A.weight"): 0.5
            for entry in self.layout.entries
            if "lora_A" in entry.key
        }
        return StrategyContext(len(self.sizes), self.layout, self.fresh_row, scaling=scaling)

    def train(self, client: int, job) -> Trained:
        """argmin_θ ½ ‖θ − c‖² + μ ‖θ − anchor‖² = (c + 2 μ anchor) / (1 + 2 μ), phase after phase."""
        row, mu = job.row.clone(), job.proximal or 0.0
        anchor = job.row if job.anchor is None else job.anchor
        for mask in job.phases:
            best = (self.centres[client] + 2 * mu * anchor) / (1 + 2 * mu)
            row = best if mask is None else torch.where(mask, best, row)
        return Trained(row, 1.0, 1)

    def reply(self, client: int, plan) -> Reply:
        """What a client answers to its plan."""

        def losses(row):
            return 0.5 * (row - self.centres[client]).square().sum()[None]

        work = carry_out(plan, Hands(lambda job, _: self.train(client, job), losses), 0)
        return Reply(
            client,
            work.deltas,
            self.sizes[client],
            work.loss,
            0.0,
            choice=work.choice,
            weights=work.weights,
        )

    def replies(self, strategy, clients=None):
        """What the clients answer to their plans."""
        clients = range(len(self.sizes)) if clients is None else clients
        return (self.reply(client, strategy.plan(client)) for client in clients)

    def federation(self, *overrides) -> Federation:
        """The round loop on these clients, without scores."""
        engine = SimpleNamespace(
            clients=[
                SimpleNamespace(name=str(client), size=size)
                for client, size in enumerate(self.sizes)
            ],
            task=SimpleNamespace(metrics=["accuracy"]),
            backbone=SimpleNamespace(set_base=lambda _: None),
            check_serves=lambda _: None,
            start=self.start,
            exchange=lambda _round, visits: (
                self.reply(client, plan) for client, plan, _ in visits
            ),
        )
        return Federation(Recipe.load("smoke", ["baselines=[]", *overrides]), engine)

    def round(self, strategy, clients=None) -> None:
        strategy.update(list(self.replies(strategy, clients)))

    def mean(self, clients=None) -> torch.Tensor:
        """Σ ρ_i c_i."""
        clients = list(range(len(self.sizes)) if clients is None else clients)
        return self.shares[clients] @ self.centres[clients] / self.shares[clients].sum()


@pytest.fixture
def formulas():
    return Formulas

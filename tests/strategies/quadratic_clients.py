"""Clients with quadratic losses in three known clusters.

They train half of the way and weigh their examples, as FedEM needs; ``FormulaClients`` go all the
way in one round, whatever they were sent.
"""

import random
from dataclasses import dataclass

import torch

from fedmerge_peft import AdapterLayout
from fedmerge_peft.recipe.strategies import FedEMRecipe, FeSEMRecipe, FLHCRecipe, IFCARecipe
from fedmerge_peft.strategies import StrategyContext, make_strategy
from fedmerge_peft.testing import reply_to
from fedmerge_peft.training.plan import Trained
from fedmerge_peft.util.seeds import derive

SIZE = 20
LAYOUT = AdapterLayout.from_tensors([("a.lora_A.weight", (4, 5), "lora")])
CENTERS = 10 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(42))
TRUTH = torch.arange(9) % 3
SIZES = torch.tensor([10, 40, 20, 30, 10, 20, 50, 30, 10])
TARGETS = CENTERS[TRUTH] + 0.5 * torch.randn(9, SIZE, generator=torch.Generator().manual_seed(43))
RECIPES = {
    "ifca": IFCARecipe(name="ifca", adapters=3),
    "fesem": FeSEMRecipe(name="fesem", adapters=3),
    "flhc": FLHCRecipe(name="flhc", adapters=3, warm_rounds=2),
    "fedem": FedEMRecipe(name="fedem", adapters=3),
}


def noise(number):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number))


def near(number):
    """Starting rows slightly towards the centers, as IFCA's guarantee requires."""
    return 0.2 * CENTERS[number % 3] + 0.1 * noise(number)


def make(recipe, fresh_row=near, clients=9):
    return make_strategy(
        recipe if not isinstance(recipe, str) else RECIPES[recipe],
        StrategyContext(clients, LAYOUT, fresh_row, seed=1),
    )


@dataclass(frozen=True)
class Quadratic:
    """ℓ(θ) = ½‖θ − target‖²; a round of training goes half of the way."""

    target: torch.Tensor
    size: int = 10

    def functions(self):
        def losses(row):
            return (0.5 * (row - self.target).square().sum() / self.size).repeat(self.size)

        def train(job, seed):
            weight = 1.0 if job.example_weights is None else float(job.example_weights.mean())
            return Trained(
                job.row - 0.5 * weight * (job.row - self.target), float(losses(job.row).mean()), 1
            )

        return train, losses


QUADRATICS = [Quadratic(target, int(size)) for target, size in zip(TARGETS, SIZES, strict=True)]


def replies(strategy, clients, who):
    for index in who:
        client, seed = clients[index], derive(0, index)
        yield reply_to(strategy.plan(index), index, client.size, *client.functions(), seed)


def federated(strategy, clients, rounds, cohort=None, seed=0):
    """Run rounds with replies in any order; an update must not change the sent rows."""
    order = random.Random(seed)
    for _ in range(rounds):
        who = order.sample(range(len(clients)), cohort or len(clients))
        plans = [strategy.plan(index) for index in who]
        before = [plan.sent.clone() for plan in plans]
        strategy.update(replies(strategy, clients, who))
        assert all(torch.equal(plan.sent, sent) for plan, sent in zip(plans, before, strict=True))
    return strategy


def mean_of_targets(group, by_size):
    weights = (group == TRUTH) * (SIZES if by_size else torch.ones(9))
    return weights.float() @ TARGETS / weights.sum()


def assert_truth(strategy):
    """Assert that clients share an adapter if and only if they are of one cluster."""
    assert strategy.weights.max(1).values.tolist() == [1] * 9
    groups = strategy.weights.argmax(1)
    assert all(
        (groups[i] == groups[k]) == (TRUTH[i] == TRUTH[k]) for i in range(9) for k in range(9)
    )

"""Clients with closed-form losses, to test strategies and the round loop without a model.

clients = FormulaClients(4)
strategy = clients.strategy("fedavg")
clients.round(strategy)
assert torch.allclose(strategy.adapter(0), clients.mean())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout, Role
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.plugins import REGISTRIES, import_installed
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.registration import rebuild
from fedmerge_peft.recipe.strategies import AnyStrategy
from fedmerge_peft.recipe.strategy_base import StrategyRecipe
from fedmerge_peft.strategies import Reply, Strategy, StrategyContext, make_strategy
from fedmerge_peft.training.execute import run_plan
from fedmerge_peft.training.plan import Plan, Train, Trained

if TYPE_CHECKING:
    from fedmerge_peft.engines.base import Engine

RANK = 4
SHAPES: list[tuple[str, tuple[int, ...], Role]] = [
    ("one.lora_A.weight", (RANK, 6), "lora"),
    ("one.lora_B.weight", (7, RANK), "lora"),
    ("two.lora_A.weight", (RANK, 5), "lora"),
    ("two.lora_B.weight", (6, RANK), "lora"),
    ("head.weight", (2, 3), "head"),
]
"""Two LoRA layers and a head: the default layout of ``FormulaClients``."""


@contextmanager
def isolated_registries() -> Iterator[None]:
    """Remove, when the context ends, all strategies, tasks and other parts registered in it."""
    before = [{entry.name for entry in registry} for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, known in zip(REGISTRIES, before, strict=True):
            for entry in registry:
                if entry.name not in known:
                    registry.remove(entry.name)
        rebuild(Recipe)


def strategy_recipe(name: str, **settings: Any) -> StrategyRecipe:
    """Return the recipe section of a strategy with these settings.

    Raises ``pydantic.ValidationError`` for invalid settings.
    """
    import_installed()
    section: StrategyRecipe = TypeAdapter(AnyStrategy).validate_python({"name": name, **settings})
    return section


def reply_to(
    plan: Plan,
    client: int,
    size: int,
    train: Callable[[Train, int], Trained],
    losses: Callable[[Tensor], Tensor],
    seed: int = 0,
    statistics: Callable[[Tensor], Tensor] | None = None,
) -> Reply:
    """Return a client's reply to a plan, given functions for its training and its losses.

    Args:
        plan: The strategy's plan.
        client: The client's number.
        size: n_i, the client's number of training examples.
        train: ``train(job, seed)`` trains one adapter.
        losses: ``losses(row)`` returns the loss of each training example with an adapter, ``(n,)``.
        seed: Seed of the plan's random draws.
        statistics: ``statistics(row)`` returns the class statistics of the training examples with
            an adapter, ``(classes, d + 2)``, for plans that measure adapters.
    """
    result = run_plan(plan, seed, train, losses, statistics)
    return Reply(
        client,
        result.deltas,
        size,
        result.loss,
        0.0,
        choice=result.choice,
        weights=result.weights,
        statistics=result.statistics,
    )


class FormulaClients:
    """Clients with losses ℓ_i(θ) = ½ ‖θ − c_i‖², whose local training is exact.

    Args:
        clients: m, the number of clients.
        layout: Layout of the adapters. Default: the layout of ``SHAPES``.
        sizes: n_i, the number of training examples of each client. Default: 10 each.
    """

    def __init__(
        self, clients: int, layout: AdapterLayout | None = None, sizes: list[int] | None = None
    ) -> None:
        self.layout = layout or AdapterLayout.from_tensors(SHAPES)
        self.sizes = sizes or [10] * clients
        self.centers = torch.randn(
            clients, self.layout.size, generator=torch.Generator().manual_seed(7)
        )
        """Minima c of the losses, ``(m, P)``, from a standard normal distribution."""
        self.shares = torch.tensor(self.sizes) / sum(self.sizes)
        """Shares ρ_i = n_i / Σ_j n_j of the training examples, ``(m,)``."""

    def fresh_row(self, number: int) -> Tensor:
        """Return the ``number``-th random adapter ``(P,)``, with B = 0 as in PEFT."""
        row = torch.randn(self.layout.size, generator=torch.Generator().manual_seed(number))
        for entry in self.layout.entries:
            if "lora_B" in entry.key:
                row[entry.columns] = 0
        return row

    def strategy_context(self) -> StrategyContext:
        """Return the inputs of a strategy. Each layer has the LoRA scaling α / r = 0.5."""
        scaling = {
            entry.key.removesuffix(".lora_A.weight"): 0.5
            for entry in self.layout.entries
            if "lora_A" in entry.key
        }
        return StrategyContext(len(self.sizes), self.layout, self.fresh_row, scaling=scaling)

    def strategy(self, name: str, **settings: Any) -> Strategy:
        """Return a strategy for these clients, by its name in recipes."""
        return make_strategy(strategy_recipe(name, **settings), self.strategy_context())

    def train(self, client: int, job: Train) -> Trained:
        """Train an adapter exactly: set the columns of each phase to the minimum θ*, in order.

            θ* = argmin_θ ½ ‖θ − c‖² + μ ‖θ − a‖² = (c + 2 μ a) / (1 + 2 μ)

        c is the client's row of ``centers``. μ is ``job.proximal``, or 0 if it is None. The anchor
        a is ``job.anchor``, or ``job.row`` if it is None. The reported loss is always 1.
        """
        row, mu = job.row.clone(), job.proximal or 0.0
        anchor = job.row if job.anchor is None else job.anchor
        for mask in job.phases:
            best = (self.centers[client] + 2 * mu * anchor) / (1 + 2 * mu)
            row = best if mask is None else torch.where(mask, best, row)
        return Trained(row, 1.0, 1)

    def statistics(self, client: int, row: Tensor) -> Tensor:
        """Return class statistics of features f with unit variance, ``(classes, d + 2)``.

        The columns are the number of examples, Σ ‖f‖² and Σ f; d is the width of the head.

        The examples are spread over the classes as evenly as possible: the first n_i mod
        ``classes`` classes have one more than the others. The mean feature of class k is the k-th
        row of the head in the minimum c_i, plus the first d columns of the adapter.
        """
        entry = self.layout.classifier
        assert entry is not None  # noqa: S101 (the layout of a plan that measures features)
        classes, width = entry.shape
        counts = torch.full((classes, 1), float(self.sizes[client] // classes))
        counts[: self.sizes[client] % classes] += 1
        means = self.centers[client][entry.columns].view(classes, width) + row[:width]
        squares = means.square().sum(dim=1, keepdim=True) + width
        return torch.cat([counts, counts * squares, counts * means], dim=1)

    def reply(self, client: int, plan: Plan) -> Reply:
        """Return a client's reply to a plan."""

        def losses(row: Tensor) -> Tensor:
            return 0.5 * (row - self.centers[client]).square().sum()[None]

        def train(job: Train, _: int) -> Trained:
            return self.train(client, job)

        def statistics(row: Tensor) -> Tensor:
            return self.statistics(client, row)

        return reply_to(plan, client, self.sizes[client], train, losses, statistics=statistics)

    def replies(self, strategy: Strategy, clients: Iterable[int] | None = None) -> Iterator[Reply]:
        """Yield the replies of clients (default: all) to the strategy's plans."""
        clients = range(len(self.sizes)) if clients is None else clients
        return (self.reply(client, strategy.plan(client)) for client in clients)

    def round(self, strategy: Strategy, clients: Iterable[int] | None = None) -> None:
        """Run one round: update the strategy with the replies of clients (default: all)."""
        strategy.update(list(self.replies(strategy, clients)))

    def mean(self, clients: Sequence[int] | None = None) -> Tensor:
        """Return FedAvg's adapter Σ ρ_i c_i / Σ ρ_i ``(P,)`` over clients (default: all)."""
        chosen = list(range(len(self.sizes)) if clients is None else clients)
        return self.shares[chosen] @ self.centers[chosen] / self.shares[chosen].sum()

    def engine(self) -> Engine:
        """Return an engine for these clients, without scores."""
        engine = SimpleNamespace(
            clients=[
                SimpleNamespace(name=str(client), size=size, validation=())
                for client, size in enumerate(self.sizes)
            ],
            task=SimpleNamespace(metrics=["accuracy"]),
            backbone=SimpleNamespace(set_base=lambda _: None),
            check_serves=lambda _: None,
            simulated=True,
            strategy_context=self.strategy_context,
            label_counts=lambda: None,
            train_clients=lambda _round, assignments: (
                (assignment.plan, self.reply(client, assignment.plan))
                for client, assignment in assignments
            ),
        )
        return cast("Engine", engine)

    def federation(self, *overrides: str) -> Federation:
        """Return a federation of these clients, with the recipe ``smoke`` and overrides."""
        return Federation(Recipe.load("smoke", ["baselines=[]", *overrides]), self.engine())

"""What the round loop and the run directory ask of an engine, wherever its clients train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.training.plan import Plan, Served
from fedmerge_peft.util.seeds import derive

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from fedmerge_peft.data import Client
    from fedmerge_peft.errors import ClientError
    from fedmerge_peft.models.backbone import Backbone
    from fedmerge_peft.recipe import Recipe


class Model(Protocol):
    """The frozen model, as far as the server's side knows it."""

    @property
    def config(self) -> Any:
        """PEFT's LoraConfig."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """Have clients train and score on pretrained weights plus ΔW ``(out, in)`` by module name, in place of what was added before."""


class Scored(Protocol):
    """The task, as far as the server's side knows it."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics; the first is the one that tables show."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the labels; empty where there are none."""


class Engine(Protocol):
    """Clients, and a way to have them train and be scored."""

    @property
    def recipe(self) -> Recipe:
        """What it was loaded for."""

    @property
    def clients(self) -> Sequence[Client]:
        """Who there is; a client's index here is its number in the federation."""

    @property
    def task(self) -> Scored:
        """What an example is, and how it is scored."""

    @property
    def backbone(self) -> Model:
        """What adapters sit on."""

    @property
    def accelerator(self) -> Accelerator:
        """Device and precision of this process."""

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` unless clients would do under this recipe just what they do here."""

    def strategy_context(self) -> StrategyContext:
        """What a strategy starts from."""

    def label_counts(self) -> list[list[int]] | None:
        """Training examples of each label, clients × labels; None where examples have no labels."""

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Run each client's plan; yield plans and replies as they come.

        A client that fails yields a ``ClientError`` in place of its reply.
        """

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Score what each client is served with, without training."""


def check_same(loaded: Recipe, recipe: Recipe, why: str, also: Sequence[str] = ()) -> None:
    """Raise ``RecipeError`` where clients would do something else under ``recipe`` than under the one an engine was loaded for."""
    ours = loaded.model_copy(
        update={
            "evaluation": loaded.evaluation.model_copy(update={"every": recipe.evaluation.every})
        }
    )
    parts = ("seed", "task", "backbone", "lora", "data", "training", "evaluation", *also)
    if other := [part for part in parts if getattr(ours, part) != getattr(recipe, part)]:
        raise RecipeError([f"{', '.join(other)}: {why}"])


def make_strategy_context(model: Backbone, clients: int, seed: int) -> StrategyContext:
    """What a strategy starts from: the model's layout, and new adapters that its first weights and the recipe's seed give."""

    def fresh_row(number: int) -> Tensor:
        return model.fresh_row(derive(seed, "adapter", number))

    return StrategyContext(
        clients, model.layout, fresh_row, model.shared, derive(seed, "strategy"), model.scaling
    )

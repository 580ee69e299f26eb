"""Interface of engines. An engine trains and scores the clients of a federation."""

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
    from fedmerge_peft.tasks.base import Padding


class Model(Protocol):
    """Frozen model: the part of its interface that the server uses."""

    @property
    def config(self) -> Any:
        """PEFT's ``LoraConfig``."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    @property
    def weights_digest(self) -> str:
        """Digest of the pretrained weights (``models/weights_digest.py``)."""

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """Set the ΔW that is added to the pretrained weights for training and scoring.

        Args:
            base: ΔW ``(out, in)``, by module name. It replaces the previous ΔW.
        """


class TaskInfo(Protocol):
    """Task: the part of its interface that the server uses."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics; tables show the first."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the labels; empty if the task has none."""

    @property
    def format(self) -> str | None:
        """Format of the texts, such as ``messages``; None if the task has only one format."""

    @property
    def padding(self) -> Padding:
        """Side on which the shorter examples of a batch are padded; ``none`` or ``alone`` if the
        model cannot use padding.
        """


class Engine(Protocol):
    """Engine that trains and scores the clients of a federation."""

    @property
    def recipe(self) -> Recipe:
        """Recipe for which the engine was loaded."""

    @property
    def simulated(self) -> bool:
        """True if all clients train on behalf of one party.

        The noise of differential privacy may then derive from the recipe's seed. Otherwise, the
        operating system's generator draws it.
        """

    @property
    def clients(self) -> Sequence[Client]:
        """All clients of the federation, in the order of their indices."""

    @property
    def task(self) -> TaskInfo:
        """Task of the recipe."""

    @property
    def backbone(self) -> Model:
        """Frozen model to which adapters are applied."""

    @property
    def accelerator(self) -> Accelerator:
        """Device and precision of this process."""

    def check_serves(self, recipe: Recipe) -> None:
        """Check that clients do the same work under this recipe as under the engine's own.

        Raises:
            RecipeError: A section that the engine uses differs (``check_same_work``).
        """

    def strategy_context(self) -> StrategyContext:
        """Return the inputs from which a strategy is constructed."""

    def label_counts(self) -> list[list[int]] | None:
        """Count each client's training examples with each label.

        An example with several labels counts for each of them.

        Returns:
            One list of counts for each client, in the order of ``TaskInfo.labels``. None if the
            task does not count labels, or if sites withhold the counts (``privacy.mode: local``).
        """

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Run each client's plan; yield plans and replies as they become available.

        A client that fails yields a ``ClientError`` in place of its reply.

        Args:
            round: Number of the round, from 1.
            assignments: Client indices and their assignments.
        """

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Score each client's served model, without training.

        Yields client indices with scores by name, or with the ``ClientError`` of a failed client.

        Args:
            served: Client indices and their served models, an adapter or a mixture each.
            completed: Number of completed rounds, for error messages.
        """


def check_same_work(
    loaded: Recipe, recipe: Recipe, reason: str, sections: Sequence[str] = ()
) -> None:
    """Check that two recipes agree in the seed and in all sections that an engine uses.

    Clients then do the same work under both. Only ``evaluation.every`` may differ.

    Args:
        loaded: Recipe for which an engine was loaded.
        recipe: Recipe to run with this engine.
        reason: End of the error message, which begins with the names of the sections that differ.
        sections: Sections to compare in addition to the sections that every engine uses.

    Raises:
        RecipeError: The seed or a section differs.
    """
    expected = loaded.model_copy(
        update={
            "evaluation": loaded.evaluation.model_copy(update={"every": recipe.evaluation.every})
        }
    )
    names = ("seed", "task", "backbone", "lora", "data", "training", "evaluation", *sections)
    if different := [name for name in names if getattr(expected, name) != getattr(recipe, name)]:
        raise RecipeError(f"{', '.join(different)}: {reason}")


def make_strategy_context(model: Backbone, clients: int, recipe: Recipe) -> StrategyContext:
    """Return the inputs from which a strategy for this model is constructed.

    Fresh adapters derive from the model's initial adapter and the seed.

    Args:
        model: Model with an adapter slot.
        clients: Number of clients.
        recipe: Seed, and the strategies that will use the model.

    Raises:
        BackboneError: A strategy of the recipe updates the backbone's weights, and they are
            quantized or shared with another layer.
    """
    if any(strategy.adds_to_backbone for strategy in (recipe.strategy, *recipe.baselines)):
        model.require_base()

    def fresh_row(number: int) -> Tensor:
        return model.fresh_row(derive(recipe.seed, "adapter", number))

    return StrategyContext(
        clients,
        model.layout,
        fresh_row,
        model.shared,
        derive(recipe.seed, "strategy"),
        model.scaling,
    )

"""Clients trained one after another in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmerge_peft.backbone import Backbone, load_backbone, model_folder
from fedmerge_peft.data import Client, federate_data
from fedmerge_peft.errors import ClientError, FedMergeError, RecipeError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.seeds import derive
from fedmerge_peft.strategies.base import Reply, Start
from fedmerge_peft.tasks import make_task
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.training.device import make_accelerator
from fedmerge_peft.training.evaluation import evaluate
from fedmerge_peft.training.reference import train

if TYPE_CHECKING:
    from accelerate import Accelerator


class LocalEngine:
    """The clients, their encoded examples, and the one backbone that all of them train on.

    What a client does depends on the recipe, the round, its name and the adapter it is sent; not on the strategy, nor on
    who else takes part. One engine therefore serves several strategies.
    """

    def __init__(
        self, recipe: Recipe, clients: Sequence[Client], task: Task, examples: Examples, backbone: Backbone, accelerator: Accelerator
    ) -> None:
        self.recipe = recipe
        self.clients = clients
        self.task = task
        self.examples = examples
        self.backbone = backbone
        self.accelerator = accelerator

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LocalEngine:
        """Load data and model. Raises ``DataError``, ``BackboneError``, ``DeviceError`` or ``RecipeError``."""
        accelerator = make_accelerator(recipe.training)
        data = federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed)
        with ExitStack() as stack:
            folder = model_folder(recipe.backbone.model, Path(stack.enter_context(TemporaryDirectory(prefix="fedmerge-"))))
            task = make_task(recipe, data.table, folder)
            backbone = load_backbone(recipe.backbone, recipe.lora, task, folder, accelerator.device, recipe.seed)
        return cls(recipe, data.clients, task, task.encode(data.table), backbone, accelerator)

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` unless clients would do under this recipe just what they do here."""
        ours = self.recipe.model_copy(update={"evaluation": self.recipe.evaluation.model_copy(update={"every": recipe.evaluation.every})})
        parts = ("seed", "task", "backbone", "lora", "data", "training", "evaluation")
        if other := [part for part in parts if getattr(ours, part) != getattr(recipe, part)]:
            raise RecipeError([f"{', '.join(other)}: the engine was loaded for a recipe that says otherwise; load one from this recipe"])

    def start(self) -> Start:
        """What a strategy starts from."""

        def fresh_row(number: int) -> Tensor:
            return self.backbone.fresh_row(derive(self.recipe.seed, "adapter", number))

        return Start(len(self.clients), self.backbone.layout, fresh_row, self.backbone.shared, derive(self.recipe.seed, "strategy"))

    def exchange(self, round: int, adapters: Iterable[tuple[int, Tensor]], *, measure: bool) -> Iterator[Reply]:
        """Send each client its adapter, let it train, and hand over the replies as they come.

        Args:
            round: Number of the round, from 1; with the client's name it decides all of the client's random draws.
            adapters: Client indices, and the row ``(P,)`` that each is sent.
            measure: Whether to score what was sent, before any training, and (as the recipe says) what was trained.

        Raises:
            ClientError: A client's work failed; raised from the original error.
        """
        for index, row in adapters:
            client = self.clients[index]
            try:
                yield self._visit(round, index, client, row, measure)
            except FedMergeError:
                raise
            except Exception as error:
                raise ClientError(client.name, round, f"{type(error).__name__}: {error}") from error

    def measure(self, adapters: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, dict[str, float]]]:
        """Score each client's adapter on its validation and test examples, without training."""
        for index, row in adapters:
            self.backbone.load_row(row)
            yield index, self._scores(self.clients[index])

    def _visit(self, round: int, index: int, client: Client, row: Tensor, measure: bool) -> Reply:
        begin = time.perf_counter()
        merged = finetuned = None
        if measure:
            self.backbone.load_row(row)
            merged = self._scores(client)
        seed = derive(self.recipe.seed, "train", round, client.name)
        trained = train(self.backbone, self.task, self.recipe.training, self.accelerator, row, self.examples, client.train, seed)
        if not bool(torch.isfinite(trained.row).all()):
            raise ClientError(
                client.name, round, "its adapter is not finite after training; lower training.learning_rate or set training.max_grad_norm"
            )
        if measure and self.recipe.evaluation.finetuned:
            finetuned = self._scores(client)
        return Reply(index, row - trained.row, client.size, trained.loss, time.perf_counter() - begin, merged, finetuned)

    def _scores(self, client: Client) -> dict[str, float]:
        scores: dict[str, float] = {}
        for part, indices in (("validation", client.validation), ("test", client.test)):
            if len(indices):
                found = evaluate(self.backbone, self.task, self.accelerator, self.examples, indices, self.recipe.evaluation.batch_size)
                scores |= {f"{part}_{name}": value for name, value in found.items()}
        return scores

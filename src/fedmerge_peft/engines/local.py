"""Clients trained one after another in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.backbone import Backbone, load_backbone, model_folder
from fedmerge_peft.data import Client, FederatedData, federate_data
from fedmerge_peft.errors import ClientError, FedMergeError, RecipeError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.seeds import derive
from fedmerge_peft.strategies.base import Reply, Start
from fedmerge_peft.tasks import make_task
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.training.device import make_accelerator
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.plan import Plan, Served, Train
from fedmerge_peft.training.prefix_cache import PrefixCache
from fedmerge_peft.training.reference import Trained, train
from fedmerge_peft.training.work import Hands, carry_out

if TYPE_CHECKING:
    from accelerate import Accelerator


class LocalEngine:
    """The clients, their encoded examples, and the one backbone that all of them train on.

    What a client does depends on the recipe, the round, its name and the plan it is sent; not on the strategy, nor on
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
        self.cache = self._make_cache()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LocalEngine:
        """Load data and model. Raises ``DataError``, ``BackboneError``, ``DeviceError`` or ``RecipeError``."""
        make_accelerator(recipe.training)  # a device that is not there should not wait for the data
        return cls.from_data(recipe, federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed))

    @classmethod
    def from_data(cls, recipe: Recipe, data: FederatedData) -> LocalEngine:
        """Load the model for these clients, wherever their examples come from. Raises as ``from_recipe``."""
        accelerator = make_accelerator(recipe.training)
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

    def lend(self, recipe: Recipe) -> LocalEngine | None:
        """An engine for a recipe that trains otherwise, with this data and model, which stay loaded; None where those differ.

        Two such engines share one model: use them in turn.
        """
        ours, theirs = self.recipe, recipe
        loaded = all(getattr(ours, part) == getattr(theirs, part) for part in ("seed", "task", "backbone", "lora", "data"))
        parts = ("device", "mixed_precision", "prefix_cache")
        if not loaded or any(getattr(ours.training, part) != getattr(theirs.training, part) for part in parts):
            return None
        lent = copy(self)
        lent.recipe = recipe
        return lent

    def start(self) -> Start:
        """What a strategy starts from."""

        def fresh_row(number: int) -> Tensor:
            return self.backbone.fresh_row(derive(self.recipe.seed, "adapter", number))

        model = self.backbone
        return Start(len(self.clients), model.layout, fresh_row, model.shared, derive(self.recipe.seed, "strategy"), model.scaling)

    def exchange(self, round: int, visits: Iterable[tuple[int, Plan, Served | None]]) -> Iterator[Reply]:
        """Send each client its plan, let it train, and hand over the replies as they come.

        Args:
            round: Number of the round, from 1; with the client's name it decides all of the client's random draws.
            visits: Client indices, what each is asked to do, and what each is served with, to be scored before any training;
                None to score nothing. After training the recipe decides what is scored.

        Raises:
            ClientError: A client's work failed; raised from the original error.
        """
        for index, plan, served in visits:
            client = self.clients[index]
            with _blaming(client, round):
                reply = self._visit(round, index, client, plan, served)
            yield reply

    def measure(self, served: Iterable[tuple[int, Served]], completed: int = 0) -> Iterator[tuple[int, dict[str, float]]]:
        """Score what each client is served with on its validation and test examples, without training.

        Args:
            served: Client indices, and what each is served with.
            completed: Number of rounds that are behind it, for errors.

        Raises:
            ClientError: Scoring a client failed; raised from the original error.
        """
        for index, each in served:
            client = self.clients[index]
            with _blaming(client, completed, "scored after the round: "):
                scores = self._scores(client, each)
            yield index, scores

    def _visit(self, round: int, index: int, client: Client, plan: Plan, served: Served | None) -> Reply:
        begin = time.perf_counter()
        before = self._scores(client, served) if served is not None else None
        work = carry_out(plan, self._hands(client), derive(self.recipe.seed, "train", round, client.name))
        if not bool(torch.isfinite(work.deltas).all()):
            raise ClientError(
                client.name, round, "its adapter is not finite after training; lower training.learning_rate or set training.max_grad_norm"
            )
        after = self._scores(client, work.trained) if served is not None and self.recipe.evaluation.finetuned else None
        seconds = time.perf_counter() - begin
        return Reply(index, work.deltas, client.size, work.loss, seconds, before, after, work.choice, work.weights)

    def _make_cache(self) -> PrefixCache | None:
        gigabytes = self.recipe.training.prefix_cache
        if self.backbone.prefix is None or gigabytes == 0:
            return None
        held = [part for client in self.clients for part in (client.train, client.validation, client.test)]
        return PrefixCache(self.backbone, self.task, self.examples, np.unique(np.concatenate(held)), gigabytes)

    def _hands(self, client: Client) -> Hands:
        model = (self.backbone, self.task)

        def do_train(job: Train, seed: int) -> Trained:
            return train(*model, self.recipe.training, self.accelerator, job, self.examples, client.train, seed, self.cache)

        def losses(row: Tensor) -> Tensor:
            return example_losses(*model, self.accelerator, row, self.examples, client.train, self.recipe.evaluation.batch_size, self.cache)

        return Hands(do_train, losses)

    def _scores(self, client: Client, served: Served) -> dict[str, float]:
        scores: dict[str, float] = {}
        for part, indices in (("validation", client.validation), ("test", client.test)):
            if len(indices):
                batch_size = self.recipe.evaluation.batch_size
                found = evaluate(self.backbone, self.task, self.accelerator, served, self.examples, indices, batch_size, self.cache)
                scores |= {f"{part}_{name}": value for name, value in found.items()}
        return scores


@contextmanager
def _blaming(client: Client, round: int, when: str = "") -> Iterator[None]:
    """Turn whatever fails into one ``ClientError`` that names the client; our own errors say enough."""
    try:
        yield
    except FedMergeError:
        raise
    except Exception as error:
        raise ClientError(client.name, round, f"{when}{type(error).__name__}: {error}") from error

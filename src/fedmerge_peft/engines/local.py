"""Engine that trains clients in this process, several in one pass of the model if possible."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data import Client, FederatedData, federate_data
from fedmerge_peft.data.clients import Indices, held_parts, rows_by_split
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.base import check_same_work, make_strategy_context
from fedmerge_peft.engines.examples_digest import examples_digest
from fedmerge_peft.engines.scoring import Scorer
from fedmerge_peft.engines.training_cache import TrainingCache
from fedmerge_peft.engines.turn import ClientTurn, client_error, shared_clock
from fedmerge_peft.errors import ClientError
from fedmerge_peft.models.backbone import Backbone, load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.tasks import make_task, reject_one_class
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.tasks.cuts import warn_of_cuts
from fedmerge_peft.tasks.equal_targets import warn_of_equal_targets
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.batching import check_task, clients_per_batch
from fedmerge_peft.training.evaluation import example_losses
from fedmerge_peft.training.execute import run_plans
from fedmerge_peft.training.features import class_statistics
from fedmerge_peft.training.first_token import cut_to_first_token
from fedmerge_peft.training.input_trial import try_inputs
from fedmerge_peft.training.labeled_head import labeled_head
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.memory import clients_that_fit
from fedmerge_peft.training.packing_trial import require_packing
from fedmerge_peft.training.plan import Plan, Served, Trained, TrainRequest
from fedmerge_peft.training.prefix_cache import prefix_cache
from fedmerge_peft.training.runtime import Runtime
from fedmerge_peft.util.profiling import timed
from fedmerge_peft.util.seeds import derive

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from fedmerge_peft.tasks.base import ComputeMetrics

log = logging.getLogger(__name__)


class LocalEngine:
    """Engine that trains and scores all clients in this process, with one runtime.

    A client's work depends on the recipe, the round, the client's name and its assignment. It does
    not depend on the strategy or on the other clients of the round, except for rounding and the
    dropout masks of clients that share a pass (``training.clients_per_batch``). One engine can
    therefore serve several strategies.
    """

    simulated = True

    def __init__(self, recipe: Recipe, clients: Sequence[Client], runtime: Runtime) -> None:
        self.recipe = recipe
        self.clients = clients
        self.runtime = runtime
        self.scorer = Scorer(runtime, recipe.evaluation, _rows_held(clients))
        self.training_cache = TrainingCache()

    @cached_property
    def examples_digest(self) -> str:
        """Digest of the clients' encoded examples (``engines/examples_digest.py``)."""
        return examples_digest(self.clients, self.runtime.examples)

    def add_metrics(self, compute_metrics: ComputeMetrics) -> None:
        """Add the metrics that a function computes to every evaluation."""
        self.task.compute_metrics = compute_metrics
        self.scorer.clear()

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, splits: Mapping[str, Dataset] | None = None
    ) -> LocalEngine:
        """Load data and model.

        Args:
            recipe: The recipe.
            splits: Examples in memory, instead of those at ``data.path``.

        Raises:
            FedMergeError: Data, model or device are missing, or do not match the recipe.
        """
        make_accelerator(recipe.training)  # fail before loading the data if the device is missing
        task = recipe.task
        data = federate_data(
            recipe.data, task.label_column, recipe.seed, task.media_column, splits=splits
        )
        engine = cls.from_data(recipe, data)
        if (targets := engine.runtime.examples.columns.get("labels")) is not None:
            train = [row for client in data.clients for row in client.train]
            warn_of_equal_targets([targets[row] for row in train], recipe.task.name)
        return engine

    @classmethod
    def from_data(cls, recipe: Recipe, data: FederatedData) -> LocalEngine:
        """Load the model for clients and examples in memory; errors as in ``from_recipe``."""
        accelerator = make_accelerator(recipe.training)
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="fedmerge-")))
            folder = model_folder(recipe.backbone, scratch)
            task = make_task(recipe, data.table, folder)
            reject_one_class(task, task.labels)
            backbone = load_backbone(
                recipe.backbone, recipe.lora, task, folder, accelerator.device, recipe.seed
            )
        try_inputs(task, backbone, accelerator, recipe.backbone.model)
        with accelerator.autocast():
            examples = task.finish(backbone.model, task.encode(data.table), backbone.device)
        runtime = Runtime(backbone, task, accelerator, examples)
        warn_of_cuts(runtime.examples, rows_by_split(data.clients))
        check_task(task, recipe, data.clients)
        rows = _rows_held(data.clients)
        if len(rows):
            runtime.first_token = cut_to_first_token(runtime, rows)
            runtime.head = labeled_head(runtime, rows)
            if recipe.training.packing:
                require_packing(runtime, rows, recipe)
                runtime.packed = True
        runtime.cache = prefix_cache(recipe, backbone, task, examples, held_parts(data.clients))
        return cls(recipe, data.clients, runtime)

    def clear_caches(self) -> None:
        """Discard cached scores and trained adapters; call this after ``Backbone.load_shared``."""
        self.scorer.clear()
        self.training_cache = TrainingCache()

    @property
    def task(self) -> Task:
        """Task of the recipe."""
        return self.runtime.task

    @property
    def backbone(self) -> Backbone:
        """The frozen model with its adapter slot."""
        return self.runtime.backbone

    @property
    def accelerator(self) -> Accelerator:
        """Device and precision of this process."""
        return self.runtime.accelerator

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` if the clients' work differs under this recipe."""
        check_same_work(
            self.recipe,
            recipe,
            "the engine was loaded for a recipe with other values; load an engine for this recipe",
        )

    def with_recipe(self, recipe: Recipe) -> LocalEngine | None:
        """Return an engine for ``recipe`` that reuses this engine's data and model.

        Return None if the two recipes differ in the seed, the task, the backbone, LoRA, the data,
        the device, the precision, packing or the prefix cache.
        Engines that share a model must be used one at a time.
        """
        sections = ("seed", "task", "backbone", "lora", "data")
        if any(getattr(self.recipe, section) != getattr(recipe, section) for section in sections):
            return None
        prefix = ("prefix_cache", "prefix_disk", "prefix_dtype")
        keys = ("device", "mixed_precision", "packing", *prefix)
        if any(getattr(self.recipe.training, key) != getattr(recipe.training, key) for key in keys):
            return None
        engine = copy(self)
        engine.recipe = recipe
        engine.scorer = self.scorer.with_recipe(recipe.evaluation)
        if recipe.training != self.recipe.training:
            engine.training_cache = TrainingCache()
        for cached in ("clients_per_batch", "automatic_epochs"):  # the batch size may differ
            vars(engine).pop(cached, None)
        return engine

    def strategy_context(self) -> StrategyContext:
        """Return the inputs from which a strategy is constructed."""
        return make_strategy_context(self.backbone, len(self.clients), self.recipe)

    def label_counts(self) -> list[list[int]] | None:
        if not self.recipe.task.counts_labels:
            return None
        held = torch.stack(list(self.runtime.examples.columns["labels"])).numpy()
        if held.ndim == 2:  # sets of labels, encoded as 0 and 1
            return [held[client.train].sum(axis=0).astype(int).tolist() for client in self.clients]
        labels = len(self.task.labels)
        return [
            np.bincount(held[client.train], minlength=labels).tolist() for client in self.clients
        ]

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Run each client's plan; yield the plan and the reply, or the error that ended its work.

        Args:
            round: Number of the round, from 1. A client's random draws derive from the seed, the
                round and the client's name. Dropout masks in a shared pass depend on all clients of
                the pass.
            assignments: Client indices and their assignments.
        """
        turns = (
            ClientTurn(round, index, self.clients[index], assignment)
            for index, assignment in assignments
        )
        while chunk := list(islice(turns, self.clients_per_batch)):
            yield from self._run(chunk)

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Score each client's served model on its validation and test examples.

        Args:
            served: Client indices and their served models.
            completed: Number of completed rounds, for error messages.
        """
        turns = ((index, self.clients[index], model) for index, model in served)
        for index, scores in self.scorer.scores(turns):
            if isinstance(scores, Exception):
                client = self.clients[index]
                yield index, client_error(client, completed, scores, "evaluation after the round: ")
            else:
                yield index, scores

    @cached_property
    def clients_per_batch(self) -> int:
        """Largest number of clients that train in one pass; reduced after the GPU lacks memory."""
        count = clients_per_batch(self.runtime, self.recipe.training, _rows_held(self.clients))
        return clients_that_fit(self.runtime, self.recipe, count)

    # ---- one chunk of clients ------------------------------------------------------------------

    def _run(self, turns: Sequence[ClientTurn]) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Run the plans of clients that may share passes of the model; yield plans and replies."""
        served = [(turn, model) for turn in turns if (model := turn.assignment.served) is not None]
        for turn, scores in self._scores(served):
            turn.before = scores
        ready = [turn for turn in turns if turn.error is None]
        plans = [
            (turn.assignment.plan, derive(self.recipe.seed, "train", turn.round, turn.client.name))
            for turn in ready
        ]

        def losses(position: int, row: Tensor) -> Tensor:
            turn = ready[position]
            with turn.clock():
                size = self.recipe.evaluation.batch_size
                rows = turn.client.train
                objective = self.runtime.objective(self.recipe.training.logits, rows)
                return example_losses(self.runtime, row, rows, size, objective)

        def statistics(position: int, row: Tensor) -> Tensor:
            turn = ready[position]
            with turn.clock():
                size = self.recipe.evaluation.batch_size
                return class_statistics(self.runtime, row, turn.client.train, size)

        with timed("train"):
            results = run_plans(plans, partial(self._train, ready), losses, statistics)
        for turn, result in zip(ready, results, strict=True):
            turn.finish(result)
        trained = [(turn, turn.result.trained) for turn in ready if turn.result is not None]
        self._validate(trained)
        if self.recipe.evaluation.finetuned:
            scored = [
                each for each in trained if each[0].before is not None and each[0].error is None
            ]
            for turn, scores in self._scores(scored):
                turn.after = scores
        for turn in turns:
            yield turn.assignment.plan, turn.reply()

    def _train(
        self, turns: Sequence[ClientTurn], queue: Sequence[tuple[int, TrainRequest]]
    ) -> list[Trained | Exception]:
        """Run requests, each with the position of its turn; jobs of similar size share a pass."""
        trained: dict[int, Trained | Exception] = {}
        waiting = sorted(
            range(len(queue)), key=lambda number: -len(turns[queue[number][0]].client.train)
        )
        while waiting:
            batch = waiting[: self.clients_per_batch]
            members = [(turns[queue[number][0]], queue[number][1]) for number in batch]
            outcomes = self._train_batch(members)
            if outcomes is None:
                self.clients_per_batch = (len(batch) + 1) // 2
                log.warning(
                    "out of memory: the limit of clients that train in one pass is now %d",
                    self.clients_per_batch,
                )
                continue
            trained |= zip(batch, outcomes, strict=True)
            waiting = waiting[len(batch) :]
        return [trained[number] for number in range(len(queue))]

    def _train_batch(
        self, members: Sequence[tuple[ClientTurn, TrainRequest]]
    ) -> Sequence[Trained | Exception] | None:
        """Train in one pass. If that fails, train one at a time, to find the failing client.

        Return None if a pass of several jobs runs out of memory.
        """
        training = self.recipe.training
        jobs = [
            Job(request.job, turn.client.train, request.seed, turn.assignment.hyperparameters)
            for turn, request in members
        ]
        if len(members) > 1:
            try:
                with shared_clock([turn for turn, _ in members]):
                    return train(self.runtime, training, jobs)
            except torch.OutOfMemoryError:
                return None
            except Exception as error:
                log.warning(
                    "%d clients train one at a time, because their joint pass failed: %s: %s",
                    len(members),
                    type(error).__name__,
                    error,
                )
        outcomes: list[Trained | Exception] = []
        for (turn, _), job in zip(members, jobs, strict=True):
            try:
                outcomes.append(self._train_alone(turn, job))
            except Exception as error:
                outcomes.append(error)
        return outcomes

    def _train_alone(self, turn: ClientTurn, job: Job) -> Trained:
        """Train one job, or return its cached outcome; add the training time to the turn."""

        def work() -> Trained:
            return train(self.runtime, self.recipe.training, [job])[0]

        if not self.backbone.as_pretrained:  # the outcome depends on the changed weights too
            with turn.clock():
                return work()
        known = self.training_cache.get_or_train(job, work)
        turn.seconds += known.seconds
        return known.trained

    def _validate(self, trained: Sequence[tuple[ClientTurn, Served]]) -> None:
        """Compute ``Reply.validation`` if the assignment asks for it and the plan has rows."""
        asked = [
            (turn, rows)
            for turn, model in trained
            if turn.assignment.validated and len(turn.client.validation)
            if (rows := turn.assignment.plan.validated_rows(model))
        ]
        with shared_clock([turn for turn, _ in asked]):
            losses = self.scorer.losses([(rows, turn.client.validation) for turn, rows in asked])
        for (turn, _), own in zip(asked, losses, strict=True):
            if isinstance(own, Exception):
                turn.fail(own)
            else:
                turn.validation = tuple(own)

    def _scores(
        self, served: Sequence[tuple[ClientTurn, Served]]
    ) -> Iterator[tuple[ClientTurn, dict[str, float]]]:
        """Yield turns with the scores of their models. If scoring fails, end the turn instead."""
        with shared_clock([turn for turn, _ in served]):
            outcomes = list(
                self.scorer.scores((turn, turn.client, model) for turn, model in served)
            )
        for turn, outcome in outcomes:
            if isinstance(outcome, Exception):
                turn.fail(outcome)
            else:
                yield turn, outcome


def _rows_held(clients: Sequence[Client]) -> Indices:
    """Return the indices of the table's rows that belong to clients, ascending."""
    return np.unique(np.concatenate(list(rows_by_split(clients).values())))

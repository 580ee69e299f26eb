"""Clients trained in this process, several in one pass of the model where that is exact."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data import Client, FederatedData, federate_data
from fedmerge_peft.data.clients import Indices
from fedmerge_peft.engines.base import check_same, make_strategy_context
from fedmerge_peft.engines.score_cache import KnownScores
from fedmerge_peft.errors import ClientError, FedMergeError
from fedmerge_peft.models.backbone import Backbone, load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.tasks import make_task
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.batched import Job, clients_per_batch, train_together
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.execute import (
    ClientResult,
    Requests,
    TrainRequest,
    carry_out_together,
    requests,
)
from fedmerge_peft.training.plan import Plan, Served
from fedmerge_peft.training.prefix_cache import PrefixCache
from fedmerge_peft.training.reference import Trained, train
from fedmerge_peft.util.profiling import timed
from fedmerge_peft.util.seeds import derive
from fedmerge_peft.util.vectors import all_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

T = TypeVar("T")


class LocalEngine:
    """The clients, their encoded examples, and the one backbone that all of them train on.

    What a client does depends on the recipe, the round, its name and the plan it is sent; not on the strategy, nor on
    who else takes part, save for rounding and for the dropout masks of those who share a pass of the model
    (``training.clients_per_batch``). One engine therefore serves several strategies.
    """

    def __init__(
        self,
        recipe: Recipe,
        clients: Sequence[Client],
        task: Task,
        examples: Examples,
        backbone: Backbone,
        accelerator: Accelerator,
    ) -> None:
        self.recipe = recipe
        self.clients = clients
        self.task = task
        self.examples = examples
        self.backbone = backbone
        self.accelerator = accelerator
        self.cache = self._make_cache()
        self.known = KnownScores()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LocalEngine:
        """Load data and model. Raises ``DataError``, ``BackboneError``, ``DeviceError`` or ``RecipeError``."""
        make_accelerator(recipe.training)  # a device that is not there should not wait for the data
        return cls.from_data(
            recipe, federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed)
        )

    @classmethod
    def from_data(cls, recipe: Recipe, data: FederatedData) -> LocalEngine:
        """Load the model for these clients, wherever their examples come from. Raises as ``from_recipe``."""
        accelerator = make_accelerator(recipe.training)
        with ExitStack() as stack:
            folder = model_folder(
                recipe.backbone.model,
                Path(stack.enter_context(TemporaryDirectory(prefix="fedmerge-"))),
            )
            task = make_task(recipe, data.table, folder)
            backbone = load_backbone(
                recipe.backbone, recipe.lora, task, folder, accelerator.device, recipe.seed
            )
        return cls(recipe, data.clients, task, task.encode(data.table), backbone, accelerator)

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` unless clients would do under this recipe just what they do here."""
        check_same(
            self.recipe,
            recipe,
            "the engine was loaded for a recipe that says otherwise; load one from this recipe",
        )

    def with_recipe(self, recipe: Recipe) -> LocalEngine | None:
        """An engine for a recipe that trains otherwise, with this data and model, which stay loaded; None where those differ.

        Two such engines share one model: use them in turn.
        """
        ours, theirs = self.recipe, recipe
        loaded = all(
            getattr(ours, part) == getattr(theirs, part)
            for part in ("seed", "task", "backbone", "lora", "data")
        )
        parts = ("device", "mixed_precision", "prefix_cache")
        if not loaded or any(
            getattr(ours.training, part) != getattr(theirs.training, part) for part in parts
        ):
            return None
        lent = copy(self)
        lent.recipe = recipe
        lent.known = KnownScores()
        vars(lent).pop("clients_per_batch", None)  # the batch size may be another
        return lent

    def strategy_context(self) -> StrategyContext:
        """What a strategy starts from."""
        return make_strategy_context(self.backbone, len(self.clients), self.recipe.seed)

    def label_counts(self) -> list[list[int]] | None:
        """Training examples of each label, clients × labels; None where examples have no labels."""
        if not self.task.labels:
            return None
        ids = torch.stack(list(self.examples.columns["labels"])).numpy()
        return [
            np.bincount(ids[each.train], minlength=len(self.task.labels)).tolist()
            for each in self.clients
        ]

    def train_clients(
        self, round: int, visits: Iterable[tuple[int, Plan, Served | None]]
    ) -> Iterator[Reply | ClientError]:
        """Send each client its plan, let it train, and hand over the replies as they come.

        In place of a client's reply comes a ``ClientError`` where its work failed, with the original error as its cause.

        Args:
            round: Number of the round, from 1; with the client's name it decides all of the client's random draws.
            visits: Client indices, what each is asked to do, and what each is served with, to be scored before any training;
                None to score nothing. After training the recipe decides what is scored.
        """
        waiting = (self._visit(round, *visit) for visit in visits)
        while chunk := list(islice(waiting, self.clients_per_batch)):
            yield from self._answers(chunk)

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Score what each client is served with on its validation and test examples, without training; a ``ClientError`` where that failed.

        Args:
            served: Client indices, and what each is served with.
            completed: Number of rounds that are behind it, for errors.
        """
        for index, each in served:
            client = self.clients[index]
            yield (
                index,
                _blaming(
                    client,
                    completed,
                    partial(self._scores, client, each),
                    "scored after the round: ",
                ),
            )

    @cached_property
    def clients_per_batch(self) -> int:
        """How many clients train in one pass of the model; fewer once the GPU has run out of memory."""
        return clients_per_batch(
            self.backbone,
            self.task,
            self.recipe.training,
            self.accelerator,
            self.examples,
            self._held,
        )

    def _visit(self, round: int, client: int, plan: Plan, served: Served | None) -> _Visit:
        return _Visit(round, client, self.clients[client], plan, served)

    def _answers(self, visits: Sequence[_Visit]) -> Iterator[Reply | ClientError]:
        """What these clients, who may share passes of the model, make of their plans; in the same order."""
        before = [
            visit.timed(partial(self._scores, visit.client, visit.served))
            if visit.served is not None
            else None
            for visit in visits
        ]

        def losses(number: int, row: Tensor) -> Tensor | ClientError:
            return visits[number].timed(partial(self._losses, visits[number].client, row))

        plans = [
            _stopped(scores)
            if isinstance(scores, ClientError)
            else visit.requests(self.recipe.seed)
            for visit, scores in zip(visits, before, strict=True)
        ]
        with timed("train"):
            done = carry_out_together(plans, partial(self._train, visits), losses)
        for visit, scores, work in zip(visits, before, done, strict=True):
            if isinstance(scores, ClientError):
                yield scores
            elif isinstance(work, ClientError):
                yield work
            else:
                yield self._reply(visit, scores, work)

    def _reply(
        self, visit: _Visit, before: dict[str, float] | None, work: ClientResult
    ) -> Reply | ClientError:
        if not all_finite(work.deltas):
            cause = "its adapter is not finite after training; lower training.learning_rate or set training.max_grad_norm"
            return ClientError(visit.client.name, visit.round, cause)
        finetuned = visit.served is not None and self.recipe.evaluation.finetuned
        after = (
            visit.timed(partial(self._scores, visit.client, work.trained)) if finetuned else None
        )
        if isinstance(after, ClientError):
            return after
        size, choice, weights = visit.client.size, work.choice, work.weights
        return Reply(
            visit.index,
            work.deltas,
            size,
            work.loss,
            visit.seconds,
            before,
            after,
            choice,
            weights,
            visit.round,
        )

    def _train(
        self, visits: Sequence[_Visit], fits: Sequence[tuple[int, TrainRequest]]
    ) -> list[Trained | ClientError]:
        """Train what these clients want trained; those with like numbers of examples in one pass."""
        trained: dict[int, Trained | ClientError] = {}
        waiting = sorted(
            range(len(fits)), key=lambda number: -len(visits[fits[number][0]].client.train)
        )
        while waiting:
            now = waiting[: self.clients_per_batch]
            found = self._train_batch(
                [(visits[client], fit) for client, fit in (fits[number] for number in now)]
            )
            if found is None:
                self.clients_per_batch = (len(now) + 1) // 2
                log.warning(
                    "out of memory: from now on %d clients train in one pass of the model, at most",
                    self.clients_per_batch,
                )
                continue
            trained |= zip(now, found, strict=True)
            waiting = waiting[len(now) :]
        return [trained[number] for number in range(len(fits))]

    def _train_batch(
        self, batch: Sequence[tuple[_Visit, TrainRequest]]
    ) -> Sequence[Trained | ClientError] | None:
        """Train these in one pass, or, where that fails, one at a time, so that the one to blame is found; None: out of memory."""
        training, rest = self.recipe.training, (self.examples, self.cache)
        if len(batch) > 1:
            begin = time.perf_counter()
            jobs = [Job(fit.job, visit.client.train, fit.seed) for visit, fit in batch]
            try:
                found = train_together(
                    self.backbone, self.task, training, self.accelerator, jobs, *rest
                )
            except torch.OutOfMemoryError:
                return None
            except Exception as error:
                log.warning(
                    "%d clients train one at a time, as they fail together: %s: %s",
                    len(batch),
                    type(error).__name__,
                    error,
                )
            else:
                for visit, _ in batch:
                    visit.seconds += (time.perf_counter() - begin) / len(batch)
                return found
        alone = partial(train, self.backbone, self.task, training, self.accelerator)
        return [
            visit.timed(
                partial(alone, fit.job, self.examples, visit.client.train, fit.seed, self.cache)
            )
            for visit, fit in batch
        ]

    def _losses(self, client: Client, row: Tensor) -> Tensor:
        size = self.recipe.evaluation.batch_size
        return example_losses(
            self.backbone,
            self.task,
            self.accelerator,
            row,
            self.examples,
            client.train,
            size,
            self.cache,
        )

    def _make_cache(self) -> PrefixCache | None:
        gigabytes = self.recipe.training.prefix_cache
        if self.backbone.prefix is None or gigabytes == 0:
            return None
        return PrefixCache(self.backbone, self.task, self.examples, self._held, gigabytes)

    @cached_property
    def _held(self) -> Indices:
        """The rows of the table that clients hold."""
        return np.unique(
            np.concatenate(
                [
                    part
                    for client in self.clients
                    for part in (client.train, client.validation, client.test)
                ]
            )
        )

    def _scores(self, client: Client, served: Served) -> dict[str, float]:
        with timed("evaluate"):
            if not self.backbone.as_pretrained:  # scores would be of these weights too
                return self._evaluate(client, served)
            return self.known.of(client.name, served, partial(self._evaluate, client, served))

    def _evaluate(self, client: Client, served: Served) -> dict[str, float]:
        scores: dict[str, float] = {}
        batch_size = self.recipe.evaluation.batch_size
        for part, indices in (("validation", client.validation), ("test", client.test)):
            if len(indices):
                found = evaluate(
                    self.backbone,
                    self.task,
                    self.accelerator,
                    served,
                    self.examples,
                    indices,
                    batch_size,
                    self.cache,
                )
                scores |= {f"{part}_{name}": value for name, value in found.items()}
        return scores


@dataclass
class _Visit:
    """One client's part in one round."""

    round: int
    index: int
    client: Client
    plan: Plan
    served: Served | None
    seconds: float = 0.0
    """Time spent on this client; of a pass that several share, its part."""

    def timed(self, work: Callable[[], T]) -> T | ClientError:
        """What some work gives: the time is this client's, and the errors are."""
        begin = time.perf_counter()
        found = _blaming(self.client, self.round, work)
        self.seconds += time.perf_counter() - begin
        return found

    def requests(self, seed: int) -> Requests:
        """What the client's plan asks for."""
        try:
            return (
                yield from requests(self.plan, derive(seed, "train", self.round, self.client.name))
            )
        except ClientError:
            raise
        except Exception as error:
            raise _blame(self.client, self.round, error) from error


def _stopped(error: ClientError) -> Requests:
    """Asks for nothing, as the client has failed already."""
    yield from ()
    raise error


def _blaming(client: Client, round: int, work: Callable[[], T], when: str = "") -> T | ClientError:
    """What some work gives, or one ``ClientError`` that names the client, for whatever fails."""
    try:
        return work()
    except Exception as error:
        return _blame(client, round, error, when)


def _blame(client: Client, round: int, error: Exception, when: str = "") -> ClientError:
    """One ``ClientError`` for whatever failed, which is its cause; our own errors say enough."""
    said = str(error) if isinstance(error, FedMergeError) else f"{type(error).__name__}: {error}"
    blamed = ClientError(client.name, round, f"{when}{said}")
    blamed.__cause__ = error
    return blamed

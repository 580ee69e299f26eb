"""Scores of served models on their clients' examples, several clients in one pass if possible."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from fedmerge_peft.data import Client
from fedmerge_peft.data.clients import Indices
from fedmerge_peft.engines.score_cache import ScoreCache, score_key
from fedmerge_peft.recipe.evaluation import EvaluationRecipe
from fedmerge_peft.training.batching import evaluated_together
from fedmerge_peft.training.evaluation import (
    evaluate_parts,
    evaluate_together,
    example_losses,
    losses_together,
)
from fedmerge_peft.training.plan import Served
from fedmerge_peft.training.runtime import Runtime
from fedmerge_peft.util.profiling import timed

log = logging.getLogger(__name__)

Scores = dict[str, float]
T = TypeVar("T")
Turn = TypeVar("Turn")


@dataclass(frozen=True)
class _Work:
    """A model, and the examples that it is evaluated on."""

    model: Served
    parts: dict[str, Indices]
    """Rows of the table by part, such as ``test``; no part is empty."""
    client: str = ""
    """Name of the client, if the scores are cached."""

    @property
    def size(self) -> int:
        return sum(map(len, self.parts.values()))


class Scorer:
    """Scorer of served models. A cache keeps the latest scores of each client.

    Several clients share a pass if ``evaluated_together`` allows it, each is served one adapter
    instead of a mixture, and a batch has room for their examples.

    Args:
        runtime: Model, task and examples.
        recipe: The section ``evaluation``.
        rows: Rows of the table that belong to clients.
        cache: Cache of scores; a new one by default.
    """

    def __init__(
        self,
        runtime: Runtime,
        recipe: EvaluationRecipe,
        rows: Indices,
        cache: ScoreCache | None = None,
    ) -> None:
        self._runtime = runtime
        self._recipe = recipe
        self._rows = rows
        self._cache = ScoreCache() if cache is None else cache

    def with_recipe(self, recipe: EvaluationRecipe) -> Scorer:
        """Return a scorer for a section ``evaluation``; share the cache if the section is equal."""
        cache = self._cache if recipe == self._recipe else None
        return Scorer(self._runtime, recipe, self._rows, cache)

    def clear(self) -> None:
        """Discard the cached scores."""
        self._cache = ScoreCache()

    def scores(
        self, turns: Iterable[tuple[Turn, Client, Served]]
    ) -> Iterator[tuple[Turn, Scores | Exception]]:
        """Yield each turn with its scores, or with the exception that ended their computation.

        Names of scores begin with ``validation_`` or ``test_``.

        Args:
            turns: Triples (turn, client, model): any value, which is yielded again with the scores;
                the client; and the model that the client is served.
        """
        waiting: deque[Turn] = deque()

        def work() -> Iterator[_Work]:
            for turn, client, model in turns:
                waiting.append(turn)
                yield _Work(model, _held_out(client), client.name)

        for group in self._groups(work()):
            with timed("evaluate"):
                outcomes = self._cached(group)
            for outcome in outcomes:
                yield waiting.popleft(), outcome

    def losses(
        self, turns: Sequence[tuple[Sequence[Tensor], Indices]]
    ) -> list[list[float] | Exception]:
        """Return a list for each turn, with the mean loss (nats) of each of its adapters.

        An exception that ended the computation takes the place of the turn's list.

        Args:
            turns: Pairs (adapters, rows): adapters ``(P,)``, and the rows of the table on which
                each of these adapters is evaluated.
        """
        work = (_Work(row, {"": indices}) for rows, indices in turns for row in rows)
        with timed("evaluate"):
            outcomes = iter(
                [one for group in self._groups(work) for one in self._outcomes(group, self._losses)]
            )
        return [_all_or_error(list(islice(outcomes, len(rows)))) for rows, _ in turns]

    # ---- several clients in one pass -------------------------------------------------------------

    @cached_property
    def _clients_per_batch(self) -> int:
        """Largest number of adapters in one pass; reduced after the GPU runs out of memory."""
        return evaluated_together(self._runtime, self._recipe, self._rows)

    def _groups(self, work: Iterable[_Work]) -> Iterator[list[_Work]]:
        """Divide the work, in its order, into groups that may share a pass."""
        group: list[_Work] = []
        for item in work:
            if group and not self._fit([*group, item]):
                yield group
                group = []
            group.append(item)
            if len(group) >= self._clients_per_batch:
                yield group
                group = []
        if group:
            yield group

    def _fit(self, group: Sequence[_Work]) -> bool:
        """Return True if the group may share a pass.

        All models must be adapters with examples. A batch must have room for as many examples of
        each client as the largest client has.
        """
        sizes = [item.size for item in group]
        return (
            all(isinstance(item.model, Tensor) for item in group)
            and min(sizes) > 0
            and len(group) * max(sizes) <= self._recipe.batch_size
        )

    def _outcomes(
        self, group: Sequence[_Work], compute: Callable[[Sequence[_Work]], list[T]]
    ) -> list[T | Exception]:
        """Compute in one pass. If that fails, compute one by one, to find the failing model."""
        if not group:
            return []
        try:
            return [*compute(group)]
        except Exception as error:
            if len(group) == 1:
                return [error]
            self._separate(len(group), error)
        return [outcome for item in group for outcome in self._outcomes([item], compute)]

    def _separate(self, count: int, error: Exception) -> None:
        """Log that a shared pass failed. If memory was short, reduce the size of later groups."""
        if isinstance(error, torch.OutOfMemoryError):
            self._clients_per_batch = (count + 1) // 2
            log.warning(
                "out of memory: the limit of clients that are evaluated in one pass is now %d",
                self._clients_per_batch,
            )
            return
        log.warning(
            "%d clients are evaluated one at a time, because their joint pass failed: %s: %s",
            count,
            type(error).__name__,
            error,
        )

    # ---- scores and losses -----------------------------------------------------------------------

    def _cached(self, group: Sequence[_Work]) -> list[Scores | Exception]:
        """Return scores; compute those that are not in the cache."""
        if not self._runtime.backbone.as_pretrained:  # scores depend on the changed weights too
            return self._outcomes(group, self._scores)
        keys = [score_key(item.model) for item in group]
        outcomes: list[Scores | Exception | None] = [
            self._cache.find(item.client, key) for item, key in zip(group, keys, strict=True)
        ]
        missing = [place for place, scores in enumerate(outcomes) if scores is None]
        computed = self._outcomes([group[place] for place in missing], self._scores)
        for place, scores in zip(missing, computed, strict=True):
            outcomes[place] = scores
            if not isinstance(scores, Exception):
                self._cache.store(group[place].client, keys[place], scores)
        return [scores for scores in outcomes if scores is not None]

    def _scores(self, group: Sequence[_Work]) -> list[Scores]:
        """Evaluate several models in one pass, or a single model in batches."""
        parts = [list(item.parts.values()) for item in group]
        if len(group) == 1:
            size = self._recipe.batch_size
            scores = [evaluate_parts(self._runtime, group[0].model, parts[0], size)]
        else:
            scores = evaluate_together(self._runtime, _stacked(group), parts)
        return [
            {
                f"{part}_{name}": score
                for part, scored in zip(item.parts, own, strict=True)
                for name, score in scored.items()
            }
            for item, own in zip(group, scores, strict=True)
        ]

    def _losses(self, group: Sequence[_Work]) -> list[float]:
        """Compute the mean losses (nats) of adapters in one pass, or of a single one in batches."""
        rows = [item.parts[""] for item in group]
        adapters = _stacked(group)
        if len(group) == 1:
            size = self._recipe.batch_size
            losses = [example_losses(self._runtime, adapters[0], rows[0], size)]
        else:
            losses = losses_together(self._runtime, adapters, rows)
        return [float(own.double().mean()) for own in losses]


def _held_out(client: Client) -> dict[str, Indices]:
    parts = {"validation": client.validation, "test": client.test}
    return {part: rows for part, rows in parts.items() if len(rows)}


def _stacked(group: Sequence[_Work]) -> Tensor:
    return torch.stack([item.model for item in group if isinstance(item.model, Tensor)])


def _all_or_error(outcomes: Sequence[float | Exception]) -> list[float] | Exception:
    """Return the numbers; if there is an exception, return the first exception instead."""
    errors = (outcome for outcome in outcomes if isinstance(outcome, Exception))
    numbers = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    return next(errors, numbers)

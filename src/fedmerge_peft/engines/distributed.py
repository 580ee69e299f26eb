"""Clients trained on several devices: those of ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedmerge_peft import distributed
from fedmerge_peft.engines.assignments import Assignments
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import ClientError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.plan import Plan, Served
from fedmerge_peft.util.row_buffer import RowBuffer

log = logging.getLogger(__name__)

_TRAINING = 3
"""How many times as long as a pass forward alone training takes for a token."""


class RankedEngine(LocalEngine):
    """One of several engines that are the same, each on a rank with a device of its own; each trains and scores some of the clients.

    All ranks run the same federation and learn from the same replies: a round's clients are dealt out by their work, and when all are
    done each reply goes from its rank to all others, in the order of the clients. So strategies are those of one rank, and so are their
    results: to the last bit where the devices compute alike. Clients who share a pass of the model stay together.

    Between the ranks travel the updates, 4 · P bytes for each adapter that a client trained, to each rank. Plans do not: each rank
    makes those of its own clients.
    """

    def train_clients(
        self, round: int, visits: Iterable[tuple[int, Plan, Served | None]]
    ) -> Iterator[Reply | ClientError]:
        asked = Assignments.of(visits)
        together = min(distributed.all_gather(lambda: self.clients_per_batch))
        passes = [
            asked.clients[start : start + together]
            for start in range(0, len(asked.clients), together)
        ]
        owners = dealt(
            [sum(map(self._work, clients)) for clients in passes], distributed.world_size()
        )
        if len(passes) < distributed.world_size():
            log.info(
                "%d passes of %d clients leave %d ranks idle",
                len(passes),
                together,
                distributed.world_size() - len(passes),
            )
        mine = [
            clients
            for clients, owner in zip(passes, owners, strict=True)
            if owner == distributed.rank()
        ]
        done = distributed.on_all_ranks(partial(self._done, round, asked, mine))
        told = ChainMap(
            *distributed.all_gather(
                lambda: {client: _without_numbers(answer) for client, answer in done.items()}
            )
        )
        for clients, owner in zip(passes, owners, strict=True):
            for client in clients:
                answer = done.pop(client, None) or told[client]
                if isinstance(answer, Reply):
                    here = (
                        answer.deltas
                        if owner == distributed.rank()
                        else torch.empty(answer.deltas.shape)
                    )
                    answer = replace(answer, deltas=distributed.broadcast(here, owner))
                yield answer

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        asked = Assignments.of(served)
        owners = dealt(
            [self._tokens(client, scored=True) for client in asked.clients],
            distributed.world_size(),
        )
        mine = [
            client
            for client, owner in zip(asked.clients, owners, strict=True)
            if owner == distributed.rank()
        ]
        measured = super().evaluate_clients(Assignments(mine, asked.make), completed)
        found = ChainMap(*distributed.all_gather(lambda: dict(measured)))
        for client in asked.clients:
            yield client, found[client]

    def _done(
        self,
        round: int,
        asked: Assignments[tuple[int, Plan, Served | None]],
        passes: Sequence[Sequence[int]],
    ) -> dict[int, Reply | ClientError]:
        """What the clients of these passes answer, with the updates put aside."""
        kept, answers = (
            RowBuffer(expected_calls=sum(map(len, passes))),
            dict[int, Reply | ClientError](),
        )
        for clients in passes:
            visits = [self._visit(round, *asked.make(client)) for client in clients]
            for client, answer in zip(clients, self._answers(visits), strict=True):
                answers[client] = (
                    replace(answer, deltas=kept.append(answer.deltas))
                    if isinstance(answer, Reply)
                    else answer
                )
        return answers

    def _work(self, client: int) -> float:
        """How long a client takes in a round, in tokens that pass forward."""
        training, held = self.recipe.training, self.clients[client]
        drawn = (
            None
            if training.steps is None
            else training.steps * training.batch_size * training.gradient_accumulation
        )
        epochs = training.epochs if drawn is None else drawn / held.size
        return _TRAINING * epochs * self._tokens(client) + self._tokens(client, scored=True)

    def _tokens(self, client: int, scored: bool = False) -> float:
        """Of the client's training examples, or of those it is scored on."""
        held = self.clients[client]
        return float(
            self.examples.lengths[
                np.concatenate([held.validation, held.test]) if scored else held.train
            ].sum()
        )


def load_engine(recipe: Recipe) -> LocalEngine:
    """Data and model for this process, or for its rank where a launcher has started several. Raises as ``LocalEngine.from_recipe``."""
    if distributed.launched_processes() == 1:
        return LocalEngine.from_recipe(recipe)
    make_accelerator(recipe.training)  # brings the ranks together
    return distributed.on_all_ranks(partial(RankedEngine.from_recipe, recipe))


def dealt(work: Sequence[float], hands: int) -> list[int]:
    """Who does each piece of work, so that all are done early: the longest first, to whoever has the least (Graham 1969)."""
    loads, owners = [0.0] * hands, [0] * len(work)
    for piece in sorted(range(len(work)), key=lambda number: -work[number]):
        owners[piece] = min(range(hands), key=loads.__getitem__)
        loads[owners[piece]] += work[piece]
    return owners


def _without_numbers(answer: Reply | ClientError) -> Reply | ClientError:
    """What the others are told of an answer first: all but the update, of which only the shape."""
    return replace(answer, deltas=answer.deltas.to("meta")) if isinstance(answer, Reply) else answer

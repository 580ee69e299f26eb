"""Clients trained on several devices: those of ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedmerge_peft import distributed
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.engines.turn import ClientTurn
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
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        lazily = Assignments.of(assignments)
        clients = lazily.clients
        size = min(distributed.all_gather(lambda: self.clients_per_batch))
        passes = [clients[start : start + size] for start in range(0, len(clients), size)]
        ranks = distributed.world_size()
        owners = balanced([sum(map(self._work, members)) for members in passes], ranks)
        if len(passes) < ranks:
            idle = ranks - len(passes)
            log.info("%d passes of %d clients leave %d ranks idle", len(passes), size, idle)
        own = [
            members
            for members, owner in zip(passes, owners, strict=True)
            if owner == distributed.rank()
        ]
        replies = distributed.on_all_ranks(partial(self._own_replies, round, lazily, own))
        shapes = ChainMap(*distributed.all_gather(lambda: _without_numbers(replies)))
        for members, owner in zip(passes, owners, strict=True):
            for client in members:
                reply = replies.pop(client, None) or shapes[client]
                if isinstance(reply, Reply):
                    here = owner == distributed.rank()
                    deltas = reply.deltas if here else torch.empty(reply.deltas.shape)
                    reply = replace(reply, deltas=distributed.broadcast(deltas, owner))
                yield lazily.make(client).plan, reply

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        lazily = Assignments.of(served)
        work = [self._tokens(client, scored=True) for client in lazily.clients]
        owners = balanced(work, distributed.world_size())
        own = [
            client
            for client, owner in zip(lazily.clients, owners, strict=True)
            if owner == distributed.rank()
        ]
        own_scores = super().evaluate_clients(Assignments(own, lazily.make), completed)
        scores = ChainMap(*distributed.all_gather(lambda: dict(own_scores)))
        for client in lazily.clients:
            yield client, scores[client]

    def _own_replies(
        self, round: int, assignments: Assignments[Assignment], passes: Sequence[Sequence[int]]
    ) -> dict[int, Reply | ClientError]:
        """Run the clients of this rank's passes; the updates go to a row buffer."""
        buffer = RowBuffer(expected_calls=sum(map(len, passes)))
        replies: dict[int, Reply | ClientError] = {}
        for clients in passes:
            turns = [
                ClientTurn(round, client, self.clients[client], assignments.make(client))
                for client in clients
            ]
            for client, (_, reply) in zip(clients, self._run(turns), strict=True):
                if isinstance(reply, Reply):
                    reply = replace(reply, deltas=buffer.append(reply.deltas))
                replies[client] = reply
        return replies

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
            self.runtime.examples.lengths[
                np.concatenate([held.validation, held.test]) if scored else held.train
            ].sum()
        )


def load_engine(recipe: Recipe) -> LocalEngine:
    """Data and model for this process, or for its rank where a launcher has started several. Raises as ``LocalEngine.from_recipe``."""
    if distributed.launched_processes() == 1:
        return LocalEngine.from_recipe(recipe)
    make_accelerator(recipe.training)  # brings the ranks together
    return distributed.on_all_ranks(partial(RankedEngine.from_recipe, recipe))


def balanced(work: Sequence[float], ranks: int) -> list[int]:
    """Return the rank of each piece of work, so that all ranks finish early.

    The longest piece goes first, to the rank with the least work so far (Graham 1969).
    """
    loads, owners = [0.0] * ranks, [0] * len(work)
    for piece in sorted(range(len(work)), key=lambda number: -work[number]):
        owners[piece] = min(range(ranks), key=loads.__getitem__)
        loads[owners[piece]] += work[piece]
    return owners


def _without_numbers(
    replies: Mapping[int, Reply | ClientError],
) -> dict[int, Reply | ClientError]:
    """Replace the updates by tensors without memory, which carry only the shape."""
    return {
        client: replace(reply, deltas=reply.deltas.to("meta"))
        if isinstance(reply, Reply)
        else reply
        for client, reply in replies.items()
    }

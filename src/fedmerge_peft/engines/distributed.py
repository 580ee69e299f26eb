"""Engine for several devices, with processes that ``accelerate launch`` or ``torchrun`` starts."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedmerge_peft import distributed
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.engines.turn import ClientTurn
from fedmerge_peft.errors import BackboneError, ClientError, DataError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.hyperparameters import automatic_epochs
from fedmerge_peft.training.plan import Plan, Served
from fedmerge_peft.util.row_buffer import RowBuffer

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

_TRAINING_COST = 3
"""Time to train on a token, in units of a forward pass on one token."""


class RankedEngine(LocalEngine):
    """Engine of one rank, which trains and scores some of the clients on its own device.

    All ranks run the same federation with the same replies. Each round distributes the clients
    over the ranks so that each rank has a similar amount of work. After training, each rank
    broadcasts its replies to all others, in the order of the clients. Strategies therefore
    need no changes. Clients that train in one pass of the model stay on one rank.

    The results equal those of a run on one rank. They are equal bit for bit if the devices compute
    identically and clients are evaluated one at a time, and up to rounding otherwise.

    Each trained adapter takes 4 · P bytes of traffic to each other rank. Plans are not sent: each
    rank creates them itself.
    """

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        assigned = Assignments.of(assignments)
        clients = assigned.clients
        size = min(distributed.all_gather(lambda: self.clients_per_batch))
        passes = [clients[start : start + size] for start in range(0, len(clients), size)]
        ranks = distributed.world_size()
        owners = balanced([sum(map(self._work, members)) for members in passes], ranks)
        if len(passes) < ranks:
            log.info(
                "idle ranks: %d of %d in %s (clients: %d, clients in one pass of the model: up to "
                "%d, passes: %d)",
                ranks - len(passes),
                ranks,
                f"round {round}" if round else "the test of learning rates",
                len(clients),
                size,
                len(passes),
            )
        own = [
            members
            for members, owner in zip(passes, owners, strict=True)
            if owner == distributed.rank()
        ]
        replies = distributed.on_all_ranks(partial(self._own_replies, round, assigned, own))
        shapes = ChainMap(*distributed.all_gather(lambda: _as_meta_tensors(replies)))
        for members, owner in zip(passes, owners, strict=True):
            for client in members:
                reply = replies.pop(client, None) or shapes[client]
                if isinstance(reply, Reply):
                    here = owner == distributed.rank()
                    deltas = reply.deltas if here else torch.empty(reply.deltas.shape)
                    reply = replace(reply, deltas=distributed.broadcast(deltas, owner))
                yield assigned.make(client).plan, reply

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        assigned = Assignments.of(served)
        work = [self._tokens(client, scored=True) for client in assigned.clients]
        owners = balanced(work, distributed.world_size())
        own = [
            client
            for client, owner in zip(assigned.clients, owners, strict=True)
            if owner == distributed.rank()
        ]
        own_scores = super().evaluate_clients(Assignments(own, assigned.make), completed)
        scores = ChainMap(*distributed.all_gather(lambda: dict(own_scores)))
        for client in assigned.clients:
            yield client, scores[client]

    def _own_replies(
        self, round: int, assignments: Assignments[Assignment], passes: Sequence[Sequence[int]]
    ) -> dict[int, Reply | ClientError]:
        """Run the clients of this rank's passes; store their updates in a row buffer."""
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
        """Estimate a client's time in a round, in units of a forward pass on one token."""
        training = self.recipe.training
        if training.steps is not None:
            examples = training.steps * training.batch_size * training.gradient_accumulation
            epochs = examples / self.clients[client].size
        elif training.epochs == "auto":
            epochs = self.automatic_epochs
        else:
            epochs = training.epochs
        return _TRAINING_COST * epochs * self._tokens(client) + self._tokens(client, scored=True)

    @cached_property
    def automatic_epochs(self) -> int:
        """Epochs per round with ``training.epochs: auto``, to estimate the clients' work."""
        sizes = [client.size for client in self.clients]
        return automatic_epochs(self.recipe.training, self.recipe.rounds, sizes)

    def _tokens(self, client: int, scored: bool = False) -> float:
        """Count a client's training tokens; with ``scored``, validation and test tokens instead."""
        parts = self.clients[client]
        rows = np.concatenate([parts.validation, parts.test]) if scored else parts.train
        return float(self.runtime.examples.lengths[rows].sum())


def load_engine(recipe: Recipe, splits: Mapping[str, Dataset] | None = None) -> LocalEngine:
    """Load data and model for this process, which is one rank if a launcher started several.

    Args:
        recipe: The recipe.
        splits: Examples in memory, instead of those at ``data.path``; the same on all ranks.

    Raises:
        DataError: Ranks have different examples in memory.
        BackboneError: Ranks have different models in memory.
        FedMergeError: See ``LocalEngine.from_recipe``.
    """
    if distributed.launched_processes() == 1:
        return LocalEngine.from_recipe(recipe, splits)
    make_accelerator(recipe.training)  # initializes the process group
    if len(set(distributed.all_gather(lambda: recipe.data.path))) > 1:
        raise DataError("data: the ranks have different examples; pass the same data on every rank")
    if len(set(distributed.all_gather(lambda: recipe.backbone.model))) > 1:
        raise BackboneError(
            "model: the ranks have different models; pass the same model on every rank, with the "
            "same weights (torch.manual_seed)"
        )
    return distributed.on_all_ranks(partial(RankedEngine.from_recipe, recipe, splits))


def balanced(work: Sequence[float], ranks: int) -> list[int]:
    """Distribute pieces of work over ranks with similar totals; return the rank of each piece.

    Pieces are assigned in descending order, each to the rank with the least work so far (Graham
    1969).
    """
    loads, owners = [0.0] * ranks, [0] * len(work)
    for piece in sorted(range(len(work)), key=lambda number: -work[number]):
        owners[piece] = min(range(ranks), key=loads.__getitem__)
        loads[owners[piece]] += work[piece]
    return owners


def _as_meta_tensors(
    replies: Mapping[int, Reply | ClientError],
) -> dict[int, Reply | ClientError]:
    """Replace the updates by meta tensors, which have a shape but no data."""
    return {
        client: replace(reply, deltas=reply.deltas.to("meta"))
        if isinstance(reply, Reply)
        else reply
        for client, reply in replies.items()
    }

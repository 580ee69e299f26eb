"""The round loop: one for every strategy and every engine."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

from fedmerge_peft.adapters import merging_weights
from fedmerge_peft.engines.assignments import Assignments
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.engines.distributed import load_engine
from fedmerge_peft.errors import ClientError, RecipeError, TooFewClientsError
from fedmerge_peft.federation.reply_checks import fault
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.record import RoundRecord, Scores
from fedmerge_peft.strategies import Reply, Strategy, make_strategy
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.differential_privacy import (
    PrivateAggregator,
    epsilon_spent,
    update_privacy,
)
from fedmerge_peft.training.plan import Plan, Served, Train
from fedmerge_peft.util import profiling
from fedmerge_peft.util.row_buffer import RowBuffer
from fedmerge_peft.util.seeds import derive

log = logging.getLogger(__name__)


class Federation:
    """Clients, an engine that trains them, and the strategy that learns from their replies.

    federation = Federation(Recipe.load("quickstart"))
    for record in federation.rounds():
        print(record)
    """

    def __init__(self, recipe: Recipe, engine: Engine | None = None) -> None:
        """Load data and model, unless an engine brings them.

        Raises ``DataError``, ``BackboneError`` and their kin, and ``RecipeError`` for an engine that was loaded for other clients' work.
        """
        self.recipe = recipe
        self.engine: Engine = engine or load_engine(recipe)
        self.engine.check_serves(recipe)
        self.strategy: Strategy = make_strategy(
            recipe.strategy, replace(self.engine.strategy_context(), aggregator=self._aggregator())
        )
        self.completed = 0
        """Rounds done so far."""
        self._asked = Counter[int]()
        """How often each client was asked in the rounds that were ``_counted``."""
        self._counted = 0
        self.epsilon(1)  # an accountant that is not there should not wait for the first round
        if recipe.clients.min_clients > (asked := len(self.cohort(1))):
            raise RecipeError(
                [
                    f"clients.min_clients: {recipe.clients.min_clients} is more than the {asked} clients that a round asks"
                ]
            )

    def _aggregator(self) -> Aggregator:
        recipe = self.recipe
        if recipe.privacy.mode == "central":
            return PrivateAggregator(
                recipe.privacy, len(self.cohort(1)), derive(recipe.seed, "privacy")
            )
        return Aggregator(recipe.robustness)

    def epsilon(self, rounds: int) -> float | None:
        """ε that the client who was asked most often has spent after so many rounds; None without differential privacy.

        Whoever is asked has spent, whether its reply counted or not. Raises ``RecipeError`` where the accountant is not installed.
        """
        if self.recipe.privacy.mode == "none" or not self.strategy.federated:
            return None
        if rounds < self._counted:
            self._asked.clear()
            self._counted = 0
        while self._counted < rounds:
            self._counted += 1
            self._asked.update(self.cohort(self._counted))
        return epsilon_spent(self.recipe.privacy, max(self._asked.values(), default=0))

    def _plan(self, client: int) -> Plan:
        """What the client is asked to do, and to do to its update before it sends it."""
        plan = self.strategy.plan(client)
        return (
            replace(plan, privacy=update_privacy(self.recipe.privacy))
            if isinstance(plan, Train) and self.strategy.federated
            else plan
        )

    def _served(self, client: int, plan: Plan) -> Served:
        """What the client predicts with before it trains; where that is what it is to train, the same tensor."""
        if isinstance(plan, Train) and self.strategy.trains_what_it_serves:
            return plan.row
        return self.strategy.served(client)

    def restore_progress(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Count these rounds, of a strategy that was brought to where they left it, as done; as objects of ``metrics.jsonl``."""
        self.completed = len(records)
        self.strategy.aggregator.norms = [
            norm for record in records if (norm := record.get("update_norm")) is not None
        ]

    def rounds(
        self,
        on_client: Callable[[Reply], None] | None = None,
        on_measured: Callable[[int, Scores], None] | None = None,
    ) -> Iterator[RoundRecord]:
        """Run the rounds that are left; yields after each.

        A round that fails changes nothing, and can be run again.

        Args:
            on_client: Called for each reply as it comes.
            on_measured: Called with (rounds completed, scores of what clients are served with) before the strategy changes them: the
                moment to keep what was just measured. Only where all clients were, as the scores of others do not compare.

        Raises:
            ClientError: A client failed, and ``clients.failures`` is raise.
            TooFewClientsError: Fewer clients replied well than ``clients.min_clients``.
        """
        while self.completed < self.recipe.rounds:
            yield self._round(self.completed + 1, on_client, on_measured)

    def evaluate(self) -> Scores | None:
        """Score what every client is served with as it stands now, without training; with ``clients.failures: skip``, those that can be.

        Raises:
            ClientError: Scoring a client failed, unless ``clients.failures`` is skip.
        """
        everyone = range(len(self.engine.clients))
        self.engine.backbone.set_base(self.strategy.base)
        found: dict[int, dict[str, float]] = {}
        served = Assignments(everyone, lambda client: (client, self.strategy.served(client)))
        for client, scores in self.engine.evaluate_clients(served, self.completed):
            if not isinstance(scores, ClientError):
                found[client] = scores
            elif self.recipe.clients.failures == "raise":
                raise scores
            else:
                log.warning("%s; left out", scores)
        return self._scores(found.items())

    def cohort(self, round: int) -> list[int]:
        """Indices of the clients that take part in a round, ascending; at least one."""
        clients = len(self.engine.clients)
        size = max(1, math.floor(self.recipe.clients.fraction * clients + 0.5))
        if size == clients:
            return list(range(clients))
        generator = np.random.default_rng(derive(self.recipe.seed, "cohort", round))
        return sorted(int(client) for client in generator.choice(clients, size, replace=False))

    def _round(
        self,
        number: int,
        on_client: Callable[[Reply], None] | None,
        on_measured: Callable[[int, Scores], None] | None,
    ) -> RoundRecord:
        begin = time.perf_counter()
        every = self.recipe.evaluation.every
        measure = number % every == 0 or number in (1, self.recipe.rounds)
        cohort = self.cohort(number)
        self.engine.backbone.set_base(self.strategy.base)
        replies, trained, failures = self.collect_replies(number, cohort, measure, on_client)
        served = self._scores(
            (reply.client, reply.served) for reply in replies if reply.served is not None
        )
        finetuned = self._scores(
            (reply.client, reply.finetuned) for reply in replies if reply.finetuned is not None
        )
        if (
            served is not None
            and len(replies) == len(self.engine.clients)
            and on_measured is not None
        ):
            on_measured(self.completed, served)
        down = sum(self.strategy.traffic(client)[0] for client in cohort)
        up = sum(self.strategy.traffic(reply.client)[1] for reply in replies)

        with profiling.timed("server"):
            self.strategy.update(replies)
            gap = fmean(self.strategy.gap(reply, trained[reply.client]) for reply in replies)
        self.completed = number
        learns = self.strategy.learns_weights
        examples = sum(reply.size for reply in replies)
        return RoundRecord(
            round=number,
            rounds=self.recipe.rounds,
            seconds=time.perf_counter() - begin,
            train_loss=sum(reply.train_loss * reply.size for reply in replies) / examples,
            served=served,
            finetuned=finetuned if self.strategy.trains_what_it_serves else None,
            weights_entropy=merging_weights.entropy(self.strategy.weights) if learns else None,
            adapter_mass=merging_weights.adapter_shares(self.strategy.weights) if learns else None,
            gap=gap,
            update_norm=self.strategy.aggregator.norms[-1]
            if self.strategy.aggregator.norms
            else None,
            bytes_down=4 * down,
            bytes_up=4 * up,
            epsilon=self.epsilon(number),
            clients=[self.engine.clients[reply.client].name for reply in replies],
            failures=failures,
            warnings=self.strategy.warnings(),
        )

    def collect_replies(
        self,
        number: int,
        cohort: Sequence[int],
        measure: bool,
        on_client: Callable[[Reply], None] | None,
    ) -> tuple[list[Reply], dict[int, Tensor], dict[str, str]]:
        """Ask these clients. The replies that count; what those clients made of the adapters that are shared; and why the other clients'
        replies do not count, by name.

        Raises:
            ClientError: The first failure, unless ``clients.failures`` is skip.
            TooFewClientsError: Fewer than ``clients.min_clients`` count.
        """
        clients, asked = self.recipe.clients, self.engine.clients
        replies: dict[int, Reply] = {}
        trained: dict[int, Tensor] = {}
        failures: dict[str, str] = {}
        waiting = set(cohort)
        plans = WeakValueDictionary[
            int, Plan
        ]()  # as long as the engine holds them; it may be done with them before it replies
        deltas, rows = RowBuffer(expected_calls=len(cohort)), RowBuffer(expected_calls=len(cohort))

        def fail(client: str, cause: str, error: ClientError | None = None) -> None:
            error = error or ClientError(client, number, cause)
            if clients.failures == "raise":
                raise error
            log.warning("%s; left out", error)
            failures[client] = cause

        def visit(client: int) -> tuple[int, Plan, Served | None]:
            with profiling.timed("server"):
                plans[client] = plan = self._plan(client)
                return client, plan, self._served(client, plan) if measure else None

        for answer in self.engine.train_clients(number, Assignments(cohort, visit)):
            if isinstance(answer, ClientError):
                fail(answer.client, answer.cause, answer)
                continue
            if answer.client not in waiting:
                if answer.client in cohort:
                    fail(
                        asked[answer.client].name, "it answered more than once"
                    )  # which of the answers is its own nobody can tell
                else:
                    fail(str(answer.client), "it was not asked")
                continue
            waiting.remove(answer.client)
            name, plan = (
                asked[answer.client].name,
                plans.get(answer.client) or self._plan(answer.client),
            )
            if cause := fault(answer, plan, number, asked[answer.client].size, clients.timeout):
                fail(name, cause)
                continue
            with profiling.timed("server"):
                trained[answer.client] = rows.append(self.strategy.trained_rows(plan, answer))
                replies[answer.client] = replace(answer, deltas=deltas.append(answer.deltas))
            if on_client is not None:
                on_client(answer)
        for client in cohort:
            if client not in replies and asked[client].name not in failures:
                fail(asked[client].name, "it did not answer")
        sound = [reply for client, reply in replies.items() if asked[client].name not in failures]
        if len(sound) < clients.min_clients:
            raise TooFewClientsError(
                f"round {number}: {len(sound)} of {len(cohort)} clients replied well, and clients.min_clients is {clients.min_clients}. "
                f"The round changed nothing. Failed: {'; '.join(f'{name}: {cause}' for name, cause in failures.items())}"
            )
        return sound, trained, failures

    def _scores(self, found: Iterable[tuple[int, dict[str, float]]]) -> Scores | None:
        return Scores.of(
            self.engine.task.metrics[0],
            {self.engine.clients[client].name: scores for client, scores in found},
        )

"""The round loop, which all strategies and engines share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.adapters import merging_weights
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.engines.confusion import Confusion, confusion_matrices
from fedmerge_peft.engines.distributed import load_engine
from fedmerge_peft.errors import ClientError, DivergedError, RecipeError
from fedmerge_peft.federation.cohorts import cohort, cohort_size
from fedmerge_peft.federation.privacy_ledger import PrivacyLedger, noise_source
from fedmerge_peft.federation.replies import ReplyCollector, RoundReplies
from fedmerge_peft.federation.reply_checks import largest_updates
from fedmerge_peft.federation.tuning import Decisions, decide
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.record import RoundRecord, Scores
from fedmerge_peft.strategies import Reply, Strategy, make_strategy, update_strategy
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.differential_privacy import PrivateAggregator, update_privacy
from fedmerge_peft.strategies.label_prior import LabelPrior
from fedmerge_peft.strategies.saved_state import SavedState
from fedmerge_peft.training.plan import Train
from fedmerge_peft.util.profiling import timed
from fedmerge_peft.util.seeds import derive

log = logging.getLogger(__name__)

OnClient = Callable[[Reply], None]
OnScores = Callable[[int, Scores], None]


class Federation:
    """Clients, an engine that trains them, and the strategy that learns from their replies.

    federation = Federation(Recipe.load("quickstart"))
    for record in federation.rounds():
        print(record)
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine | None = None,
        decisions: Decisions | None = None,
        ledger: PrivacyLedger | None = None,
        folder: Path | None = None,
    ) -> None:
        """Load data and model, unless an engine is given.

        Args:
            recipe: Recipe of the run.
            engine: Engine that was loaded for the recipe. Default: a new one.
            decisions: Values for keys that are ``auto``, if they were chosen before. Default:
                ``decide`` chooses them before the first round.
            ledger: Privacy ledger of all methods of the run. Default: a ledger of this method, in
                memory.
            folder: Folder for temporary files of the server. Default: ``TMPDIR``.

        Raises:
            RecipeError: The engine was loaded for a recipe under which clients do other work;
                ``evaluation.serve: best`` or ``stop.patience`` is set, but no client has validation
                examples; ``clients.min_clients`` exceeds the number of clients in a round; or ε
                cannot be computed (``PrivacyLedger.check``).
            FedMergeError: Data, model or device are missing, or do not match the recipe.

        Also raises the errors of ``make_strategy``.
        """
        self.recipe = recipe
        self.engine: Engine = engine or load_engine(recipe)
        self.engine.check_serves(recipe)
        self._folder = folder
        self.strategy = self._new_strategy()
        self.completed = 0
        """Number of completed rounds."""
        self.decisions = decisions
        """Values for keys that are ``auto``; None before they are chosen."""
        self.ledger = ledger or PrivacyLedger(
            recipe, len(self.engine.clients), simulated=self.engine.simulated
        )
        """Ledger from which ε is computed; unused without differential privacy."""
        for needed, key, remedy in (
            (
                recipe.evaluation.serve == "best",
                "evaluation.serve: best",
                "set evaluation.serve to last",
            ),
            (recipe.stop.patience is not None, "stop.patience", "set it to null"),
        ):
            if needed and not any(len(client.validation) for client in self.engine.clients):
                raise RecipeError(
                    f"{key} needs validation examples, but no client has any; raise "
                    f"data.validation_fraction, or {remedy}"
                )
        if self.private:
            self.ledger.check()
        selected = cohort_size(recipe, len(self.engine.clients))
        if recipe.clients.min_clients > max(1, selected):
            mean = "mean " if recipe.clients.sampling == "poisson" else ""
            raise RecipeError(
                f"clients.min_clients: {recipe.clients.min_clients} exceeds the {mean}number of "
                f"clients in a round, {selected:g}; lower it, or raise clients.fraction if it is "
                "below 1"
            )

    def _new_strategy(self) -> Strategy:
        """Return the strategy in its state before the first round."""
        context = replace(
            self.engine.strategy_context(),
            aggregator=self._aggregator(),
            label_counts=self._label_counts(),
            validation=self.recipe.privacy.mode == "none"
            and any(len(client.validation) for client in self.engine.clients),
            folder=self._folder,
        )
        strategy = make_strategy(self.recipe.strategy, context)
        if not self.recipe.serving.label_prior:
            return strategy
        balanced = self.recipe.training.logits == "adjusted"
        return LabelPrior(strategy, context, balanced=balanced)

    def decide(self) -> Decisions:
        """Return the values for the recipe's keys that are ``auto``; choose them if needed.

        Raises the errors of ``tuning.decide``.
        """
        if self.decisions is None:
            self.decisions = decide(self.recipe, self.engine)
        return self.decisions

    def rounds(
        self, on_client: OnClient | None = None, on_scores: OnScores | None = None
    ) -> Iterator[RoundRecord]:
        """Run the remaining rounds; yield a record after each.

        A failed round does not change the strategy; call ``rounds`` again to repeat it. With
        differential privacy, it still counts toward ε.

        Args:
            on_client: Called with each valid reply as it arrives.
            on_scores: Called with the number of completed rounds and the scores of all clients'
                served models, before the strategy changes them. Not called if some clients have no
                scores, because the means would not be comparable.

        Raises:
            ClientError: A client failed, and ``clients.failures`` is raise.
            TooFewClientsError: There are fewer valid replies than ``clients.min_clients``.
            DivergedError: The strategy's state would not be finite, or an adapter's norm would be
                too large.
            PluginError: A plugin's strategy failed.
            RunError: The ledger's file cannot be written.

        Also raises the errors of ``decide``.
        """
        self.decide()
        while self.completed < self.recipe.rounds:
            yield self._round(self.completed + 1, on_client, on_scores)

    def _round(
        self, number: int, on_client: OnClient | None, on_scores: OnScores | None
    ) -> RoundRecord:
        begin = time.perf_counter()
        selected = self.cohort(number)
        if self.private:
            self.ledger.charge(self.recipe.strategy.name, number)
        self.engine.backbone.set_base(self.strategy.base)
        collected = (
            self.collect_replies(number, selected, on_client) if selected else self._nothing(number)
        )
        replies = collected.replies
        served = self._scores((reply.client, reply.served) for reply in replies)
        finetuned = self._scores((reply.client, reply.finetuned) for reply in replies)
        complete = served is not None and len(served.clients) == len(self.engine.clients)
        if served is not None and complete and on_scores is not None:
            on_scores(self.completed, served)
        down = sum(self.strategy.traffic(client)[0] for client in selected)
        up = sum(self.strategy.traffic(reply.client)[1] for reply in replies if selected)

        known_norms = len(self.strategy.aggregator.norms)
        with timed("server"):
            equal = self.private and self.recipe.privacy.mode == "local"  # sizes are private
            counted = [replace(reply, size=1) for reply in replies] if equal else replies
            self._update(number, counted)
            for decision in self.strategy.decisions():
                log.info("round %d: %s", number, decision)
            gap = fmean(
                self.strategy.gap(reply, collected.trained[reply.client]) for reply in replies
            )
        self.completed = number
        weights = self.strategy.weights
        merges = self.strategy.learns_weights and weights.shape[1] > 1
        norms = self.strategy.aggregator.norms
        return RoundRecord(
            round=number,
            rounds=self.recipe.rounds,
            seconds=time.perf_counter() - begin,
            train_loss=_mean_loss(replies),
            served=served,
            finetuned=finetuned if self.strategy.trains_what_it_serves else None,
            weights_entropy=merging_weights.entropy(weights) if merges else None,
            adapter_mass=merging_weights.adapter_shares(weights) if merges else None,
            gap=gap,
            update_norm=norms[-1] if len(norms) > known_norms else None,
            bytes_down=4 * down,
            bytes_up=4 * up,
            epsilon=self.ledger.epsilon if self.private else None,
            noise=noise_source(self.engine.simulated) if self.private else None,
            clients=[self.engine.clients[reply.client].name for reply in replies if selected],
            failures=collected.failures,
            warnings=self.strategy.warnings(),
            decisions=self.strategy.decisions(),
        )

    def _nothing(self, number: int) -> RoundReplies:
        """Return the replies of a round without clients: one zero update, which gets the noise."""
        plan = self.strategy.plan(0)
        zero = torch.zeros(plan.returned_rows, plan.sent.shape[1])
        reply = Reply(0, zero, 1, None, 0.0, round=number)
        return RoundReplies([reply], {0: self.strategy.trained_rows(plan, reply)})

    def _update(self, number: int, replies: Sequence[Reply]) -> None:
        """Update the strategy; restore its previous state if the update fails.

        Raises:
            DivergedError: The new state is not usable (``SavedState.fault_of_next``).
            PluginError: A plugin's strategy failed.
        """
        saved, norms = SavedState.of(self.strategy), list(self.strategy.aggregator.norms)
        try:
            update_strategy(self.recipe.strategy.name, self.strategy, replies)
            if fault := saved.fault_of_next(self.strategy):
                names = [client.name for client in self.engine.clients]
                raise DivergedError(
                    f"round {number}: {fault}, so the round had no effect. "
                    f"{largest_updates(replies, names)}"
                )
        except Exception:
            self.strategy = self._new_strategy()
            saved.restore(self.strategy)
            self.strategy.aggregator.norms = norms
            raise

    def collect_replies(
        self, number: int, cohort: Sequence[int], on_client: OnClient | None
    ) -> RoundReplies:
        """Train the cohort and return the valid replies.

        Raises ``ClientError`` and ``TooFewClientsError``, as ``rounds`` does.
        """
        every = self.recipe.evaluation.every
        scored = number % every == 0 or number in (1, self.recipe.rounds)
        hyperparameters = self.decide().hyperparameters
        assignments = Assignments(
            cohort,
            lambda client: replace(
                self._assignment(client, scored), hyperparameters=hyperparameters
            ),
        )
        collector = ReplyCollector(
            number, cohort, self.engine.clients, self.recipe.clients, self.strategy
        )
        for plan, answer in self.engine.train_clients(number, assignments):
            with timed("server"):
                counts = collector.add(plan, answer)
            if counts and on_client is not None and isinstance(answer, Reply):
                on_client(answer)
        return collector.close()

    def _assignment(self, client: int, scored: bool) -> Assignment:
        """Return the assignment of a client: its plan, with the privacy of its update.

        If ``scored``, the assignment also has the model that the client is served.
        """
        with timed("server"):
            plan = self.strategy.plan(client)
            if isinstance(plan, Train) and self.recipe.strategy.federated:
                plan = replace(plan, privacy=update_privacy(self.recipe.privacy))
            validated = self.strategy.validates() and self.recipe.privacy.mode == "none"
            if not scored:
                return Assignment(plan, validated=validated)
            if isinstance(plan, Train) and self.strategy.trains_what_it_serves:
                return Assignment(plan, plan.row, validated=validated)  # not merged again
            return Assignment(plan, self.strategy.served(client), validated=validated)

    def evaluate(self) -> Scores | None:
        """Score the served models of all clients, without training.

        With ``clients.failures: skip``, clients are skipped if their scoring fails. Return None if
        no client has scores.

        Raises:
            ClientError: Scoring a client failed, and ``clients.failures`` is raise.
        """
        self.engine.backbone.set_base(self.strategy.base)
        served = Assignments(range(len(self.engine.clients)), self.strategy.served)
        known: dict[int, dict[str, float]] = {}
        for client, scores in self.engine.evaluate_clients(served, self.completed):
            if not isinstance(scores, ClientError):
                known[client] = scores
            elif self.recipe.clients.failures == "raise":
                raise scores
            else:
                log.warning("%s; skipped", scores)
        return self._scores(known.items())

    def confusion(self, scored: Collection[str]) -> Confusion | None:
        """Count the test examples of each client named in ``scored`` by true and predicted class.

        Return None for private runs and for tasks without confusion matrices.
        """
        if self.private:
            return None
        chosen = [
            index for index, client in enumerate(self.engine.clients) if client.name in scored
        ]
        return confusion_matrices(self.engine, Assignments(chosen, self.strategy.served))

    @property
    def private(self) -> bool:
        """True if the clients share updates under differential privacy."""
        return self.recipe.privacy.mode != "none" and self.recipe.strategy.federated

    def cohort(self, round: int) -> list[int]:
        """Return the indices of the clients selected for a round, ascending.

        Across sites, a Poisson sample is secret, and each call draws a new one.
        """
        secret = not self.engine.simulated
        return cohort(self.recipe, len(self.engine.clients), round, secret=secret)

    def restore_progress(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Mark the rounds in these records of ``metrics.jsonl`` as completed.

        The strategy must be in the state after the last of these rounds.
        """
        self.completed = len(records)
        if self.private:
            self.ledger.begin(self.recipe.strategy.name, self.completed)
        norms = (record.get("update_norm") for record in records)
        self.strategy.aggregator.norms = [norm for norm in norms if norm is not None]

    def _aggregator(self) -> Aggregator:
        recipe = self.recipe
        if recipe.privacy.mode == "central":
            size = cohort_size(recipe, len(self.engine.clients))
            seed = derive(recipe.seed, "privacy") if self.engine.simulated else None
            return PrivateAggregator(recipe.privacy, size, seed)
        return Aggregator(recipe.robustness)

    def _label_counts(self) -> Tensor | None:
        """Return the clients' label counts; None if there are none, or if they stay private."""
        if self.recipe.privacy.mode != "none":
            return None
        counts = self.engine.label_counts()
        return None if counts is None else torch.tensor(counts)

    def _scores(self, clients: Iterable[tuple[int, dict[str, float] | None]]) -> Scores | None:
        names = self.engine.clients
        scores = {names[client].name: values for client, values in clients if values is not None}
        return Scores.of(self.engine.task.metrics[0], scores)


def _mean_loss(replies: Sequence[Reply]) -> float | None:
    """Return the mean training loss, weighted by size; None if no client reports it."""
    losses = [(reply.train_loss, reply.size) for reply in replies if reply.train_loss is not None]
    if not losses:
        return None
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)

"""The round loop: one for every strategy and every engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean

import numpy as np

from fedmerge_peft.adapters import weights as merging_weights
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.files import held
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.record import RoundRecord, Scores
from fedmerge_peft.run import Run
from fedmerge_peft.seeds import derive
from fedmerge_peft.strategies import Reply, Strategy, make_strategy


class Federation:
    """Clients, an engine that trains them, and the strategy that learns from their replies.

    federation = Federation(Recipe.load("quickstart"))
    for record in federation.rounds():
        print(record)
    """

    def __init__(self, recipe: Recipe, engine: LocalEngine | None = None) -> None:
        """Load data and model, unless an engine brings them.

        Raises ``DataError``, ``BackboneError`` and their kin, and ``RecipeError`` for an engine that was loaded for other clients' work.
        """
        self.recipe = recipe
        self.engine = engine or LocalEngine.from_recipe(recipe)
        self.engine.check_serves(recipe)
        self.strategy: Strategy = make_strategy(recipe.strategy, self.engine.start())
        self.completed = 0
        """Rounds done so far."""

    def rounds(
        self, on_client: Callable[[Reply], None] | None = None, on_measured: Callable[[int, Scores], None] | None = None
    ) -> Iterator[RoundRecord]:
        """Run the rounds that are left; yields after each.

        Args:
            on_client: Called for each reply as it comes.
            on_measured: Called with (rounds completed, scores of what clients are served with) before the strategy changes them: the
                moment to keep what was just measured. Only where all clients were, as the scores of others do not compare.
        """
        while self.completed < self.recipe.rounds:
            yield self._round(self.completed + 1, on_client, on_measured)

    def measure(self) -> Scores | None:
        """Score what every client is served with as it stands now, without training."""
        everyone = range(len(self.engine.clients))
        self.engine.backbone.set_base(self.strategy.base)
        return self._scores(self.engine.measure(((client, self.strategy.served(client)) for client in everyone), self.completed))

    def cohort(self, round: int) -> list[int]:
        """Indices of the clients that take part in a round, ascending; at least one."""
        clients = len(self.engine.clients)
        size = max(1, math.floor(self.recipe.clients.fraction * clients + 0.5))
        if size == clients:
            return list(range(clients))
        generator = np.random.default_rng(derive(self.recipe.seed, "cohort", round))
        return sorted(int(client) for client in generator.choice(clients, size, replace=False))

    def _round(
        self, number: int, on_client: Callable[[Reply], None] | None, on_measured: Callable[[int, Scores], None] | None
    ) -> RoundRecord:
        begin = time.perf_counter()
        every = self.recipe.evaluation.every
        measure = number % every == 0 or number in (1, self.recipe.rounds)
        plans = {client: self.strategy.plan(client) for client in self.cohort(number)}
        visits = ((client, plan, self.strategy.served(client) if measure else None) for client, plan in plans.items())
        self.engine.backbone.set_base(self.strategy.base)
        replies: list[Reply] = []
        for reply in self.engine.exchange(number, visits):
            replies.append(reply)
            if on_client is not None:
                on_client(reply)
        served = self._scores((reply.client, reply.served) for reply in replies if reply.served is not None)
        finetuned = self._scores((reply.client, reply.finetuned) for reply in replies if reply.finetuned is not None)
        if served is not None and len(replies) == len(self.engine.clients) and on_measured is not None:
            on_measured(self.completed, served)
        traffic = [self.strategy.traffic(client) for client in plans]

        self.strategy.update(replies)
        self.completed = number
        learns = self.strategy.learns_weights
        gaps = [gap for reply in replies if (gap := self.strategy.gap(plans[reply.client], reply)) is not None]
        examples = sum(reply.size for reply in replies)
        return RoundRecord(
            round=number,
            rounds=self.recipe.rounds,
            seconds=time.perf_counter() - begin,
            train_loss=sum(reply.train_loss * reply.size for reply in replies) / examples,
            served=served,
            finetuned=finetuned if self.strategy.trains_what_it_serves else None,
            weights_entropy=merging_weights.entropy(self.strategy.weights) if learns else None,
            adapter_mass=merging_weights.mass(self.strategy.weights) if learns else None,
            gap=fmean(gaps) if gaps else None,
            bytes_down=sum(4 * down for down, _ in traffic),
            bytes_up=sum(4 * up for _, up in traffic),
            clients=[self.engine.clients[reply.client].name for reply in replies],
            warnings=self.strategy.warnings(),
        )

    def _scores(self, found: Iterable[tuple[int, dict[str, float]]]) -> Scores | None:
        return Scores.of(self.engine.task.metrics[0], {self.engine.clients[client].name: scores for client, scores in found})


def federate(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    engine: LocalEngine | None = None,
    on_start: Callable[[Federation, Run], None] | None = None,
    on_client: Callable[[Reply], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Run:
    """Run a whole recipe, and its baselines, into a run directory.

    Args:
        recipe: What to federate.
        out: The run directory; by default ``runs/<name>``. Baselines go to ``<out>/baselines/<strategy>``.
        engine: Loaded data and model to use; by default those that the recipe names.
        on_start: Called before the first round of the recipe's strategy and of each baseline.
        on_client: Called for each client's reply.
        on_round: Called after each round, once it is on disk.

    Returns:
        The run of the recipe's own strategy; ``run.baselines`` has the others.

    Raises:
        RunExistsError: The directory is not empty. Nothing was touched.
        RunBusyError: Another process is writing it. Nothing was touched.
        FedMergeError: Anything else the recipe got wrong; rounds already finished stay on disk.
    """
    directory = Path(out) if out is not None else Run.default_path(recipe)
    Run.check_free(directory)
    engine = engine or LocalEngine.from_recipe(recipe)
    with held(directory):
        run = _federate_one(recipe, directory, engine, on_start, on_client, on_round)
        for baseline in recipe.baselines:
            if baseline.name == recipe.strategy.name:
                continue
            alone = recipe.model_copy(update={"strategy": baseline, "baselines": []})
            _federate_one(alone, run.baseline_path(baseline.name), engine, on_start, on_client, on_round)
    return Run.open(directory)


def _federate_one(
    recipe: Recipe,
    directory: Path,
    engine: LocalEngine,
    on_start: Callable[[Federation, Run], None] | None,
    on_client: Callable[[Reply], None] | None,
    on_round: Callable[[RoundRecord], None] | None,
) -> Run:
    federation = Federation(recipe, engine)
    run = Run.create(directory, recipe, engine)
    if on_start is not None:
        on_start(federation, run)

    def keep_best(completed: int, scores: Scores) -> None:
        run.offer_best(completed, scores, federation.strategy)

    for record in federation.rounds(on_client, keep_best):
        run.append(record, federation.strategy)
        if on_round is not None:
            on_round(record)
    final = federation.measure()
    if final is not None:
        run.offer_best(federation.completed, final, federation.strategy)
    run.finish(federation.completed, final)
    return run

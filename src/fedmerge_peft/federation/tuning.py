"""Values for the keys of ``training`` that are ``auto``, chosen before the first round.

The learning rate is chosen by a range test (after Smith 2017, arXiv 1506.01186, with separate
trials instead of a rising rate). A few clients train a new adapter at each rate of a geometric
grid, on the same examples in the same order. Rates are compared by each client's loss relative to
its own start:

ρ_ir = ℓ_i(θ_ir) / ℓ_i(θ_0)        client i, rate r, trained adapter θ_ir, new adapter θ_0

ℓ_i is the loss on the validation examples. If no client has any, or if no rate reduces their loss
by more than its noise, ℓ_i is the mean training loss. The denominator is then the training loss at
the smallest rate, which hardly changes the adapter.

The choice is the smallest rate whose mean ρ is within one standard error of the lowest mean
(``smallest_tied``).

A client that trains alone overfits at a lower rate than in a federation, where the mean of updates
cancels what only one client has learned. Rates higher than the choice by validation loss may
therefore be better in the federation. The training loss gives an upper bound: it is lowest just
below the rates that diverge. The bound is one step below the rate with the lowest training loss. If
the bound is higher than the choice by validation loss, the geometric mean of the two is used.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.data import Client
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.errors import ClientError, RecipeError
from fedmerge_peft.federation.rate_choice import (
    below_lowest,
    lowest,
    reduces_loss,
    smallest_tied,
)
from fedmerge_peft.federation.reply_checks import validate_reply
from fedmerge_peft.federation.work import check_work
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.training.hyperparameters import Hyperparameters, automatic_epochs
from fedmerge_peft.training.optimization import count_steps
from fedmerge_peft.training.plan import Served, Train
from fedmerge_peft.util.seeds import derive

log = logging.getLogger(__name__)

Losses = Mapping[int, float]
"""Loss in nats, by client index; inf if the client failed."""

LADDERS: dict[str, tuple[float, ...]] = {
    "adamw": (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 0.15, 0.5),
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
}
"""Rates that a test may try, ascending, by optimizer; "adamw" stands for all optimizers except SGD.
The middle rate for adamw is also the tuned rate of several shipped recipes."""
_GRID = slice(2, 7)
"""Part of a ladder that every test tries. If the best rate is at an end of this part, the test may
try further rates (``_extended``)."""
_MIDDLE = 4
"""Index of the default rate. It is used with differential privacy, which rules out a test, and if
no rate reduces the loss and no client fails at the default."""
_CLIENTS = 4
"""Maximum number of clients in a test."""
_STEPS = 30
"""Optimizer steps of a client at each rate, rounded up to whole rounds of local training. This is
about a seventh of the steps of a run with ``epochs: auto``, enough to separate the rates."""
_SMALLEST_LOSS = 1e-8
"""Lower bound of the denominators, nats."""


@dataclass(frozen=True)
class Decisions:
    """The chosen values and their reasons."""

    document: Mapping[str, Mapping[str, Any]]
    """Content of ``decisions.json``: ``value``, ``reason`` and details, by key of ``training``.
    Empty if no key is ``auto``."""

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The chosen values."""
        return Hyperparameters.parse({key: entry["value"] for key, entry in self.document.items()})


def open_keys(recipe: Recipe) -> list[str]:
    """Return the keys of ``training`` that are ``auto``; ``epochs`` only without ``steps``."""
    training = recipe.training
    keys = ["epochs"] if training.epochs == "auto" and training.steps is None else []
    return [*keys, "learning_rate"] if training.learning_rate == "auto" else keys


def decide(recipe: Recipe, engine: Engine) -> Decisions:
    """Choose a value for each key of ``training`` that is ``auto`` (``open_keys``).

    The result follows from the recipe and the clients' losses: the same seed gives the same
    choice, on any number of ranks. Nothing is trained if the learning rate is a number, or if the
    run has differential privacy.

    Args:
        recipe: Recipe of the run.
        engine: Engine with the clients. On several ranks, every rank calls this function.

    Raises:
        RecipeError: The range test gives no finite loss, because all of its clients failed; no
            client has training examples; or the run takes too many steps (``check_work``).
    """
    document: dict[str, dict[str, Any]] = {}
    keys = open_keys(recipe)
    if "epochs" in keys:
        private = recipe.privacy.mode != "none"
        sizes = [] if private else [client.size for client in engine.clients]
        epochs = automatic_epochs(recipe.training, recipe.rounds, sizes)
        reason = (
            f"computed without the clients' sizes, which privacy.mode: {recipe.privacy.mode} does "
            "not protect"
        )
        document["epochs"] = {
            "value": epochs,
            "reason": reason if private else "from the clients' median size",
        }
    epochs_only = Decisions(document).hyperparameters
    check_work(recipe, [client.size for client in engine.clients], epochs_only)
    if "learning_rate" in keys:
        document["learning_rate"] = _learning_rate(recipe, engine, epochs_only)
    for decision in reversed(describe(document)):
        log.info("%s", decision)
    return Decisions(document)


def describe(document: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line of text for each decision, the learning rate first."""
    return [
        f"{key.replace('_', ' ')} {document[key]['value']:g}, {document[key]['reason']}"
        for key in ("learning_rate", "epochs")
        if key in document
    ]


def _learning_rate(recipe: Recipe, engine: Engine, epochs: Hyperparameters) -> dict[str, Any]:
    """Return the entry of ``decisions.json`` for the learning rate."""
    ladder = LADDERS["sgd" if recipe.training.optimizer == "sgd" else "adamw"]
    if recipe.privacy.mode != "none":
        reason = (
            f"not tested, because privacy.mode: {recipe.privacy.mode} does not protect the losses "
            "of a test"
        )
        return {"value": ladder[_MIDDLE], "reason": reason}
    begin = time.perf_counter()
    test = _RangeTest(recipe, engine, epochs)
    log.info("testing learning rates on %s", ", ".join(test.names))
    rates: list[float] = list(ladder[_GRID])
    for rate in rates:
        test.run(rate)
    test.drop_failed()
    for measure in test.measures:
        rates, ratios = _extended(test, measure, rates, ladder)
        best = lowest(ratios)
        if conclusive := reduces_loss(ratios[best]):
            break
    tested = f"{len(rates)} rates on {len(test.names)} client{'s' * (len(test.names) > 1)}"
    if conclusive:
        by = ", by their training loss" if measure == "training loss" else ""
        value, reason = rates[smallest_tied(ratios, best)], f"chosen from {tested}{by}"
        if measure == "validation loss":
            highest = below_lowest(rates, test.ratios(rates, "training loss"))
            if highest > value:
                value = math.sqrt(value * highest)
                reason = f"between the best of {tested} and {highest:g}, the bound by training loss"
    else:
        middle = rates.index(ladder[_MIDDLE])
        finite = bool(np.isfinite(ratios[middle]).all())
        value = rates[middle] if finite else rates[best]
        choice = "the default" if finite else "the rate with the lowest loss"
        reason = f"{choice}, because none of {tested} reduced the loss"
        if not finite:
            reason += f", and a client failed at the default {rates[middle]:g}"
    return {
        "value": value,
        "reason": reason,
        "reduced_loss": conclusive,
        "measure": measure,
        **test.document(rates),
        "seconds": time.perf_counter() - begin,
    }


def _extended(
    test: _RangeTest, measure: str, rates: list[float], ladder: Sequence[float]
) -> tuple[list[float], NDArray[np.float64]]:
    """Try the next rate while the best one is the first or last; return all rates and their ρ.

    If no rate reduces the validation loss, no further rate is tried.
    """
    while True:
        ratios = test.ratios(rates, measure)
        best = lowest(ratios)
        first, last = ladder.index(rates[0]), ladder.index(rates[-1])
        if measure == "validation loss" and not reduces_loss(ratios[best]):
            return rates, ratios  # the best rate only does the least harm
        if best == len(rates) - 1 and last + 1 < len(ladder):
            rates = [*rates, ladder[last + 1]]
            test.run(rates[-1])
        elif best == 0 and first > 0:
            rates = [ladder[first - 1], *rates]
            test.run(rates[0])
        else:
            return rates, ratios


# ---- the clients' work ---------------------------------------------------------------------------


class _RangeTest:
    """Trials of learning rates on a few clients, which all start from the same new adapter θ_0.

    Trials belong to round 0, so they share no random draws with the rounds of the run.
    """

    def __init__(self, recipe: Recipe, engine: Engine, epochs: Hyperparameters) -> None:
        self._recipe = recipe
        self._engine = engine
        self._epochs = epochs.epochs
        engine.backbone.set_base({})
        self._row = engine.strategy_context().fresh_row(0)
        self._clients = drawn_clients(engine.clients, recipe.seed)
        self._start: Losses = {}
        self._trials: dict[str, dict[float, Losses]] = {"training loss": {}}
        if any(len(engine.clients[client].validation) for client in self._clients):
            self._trials = {"validation loss": {}, **self._trials}
            self._start = self._validation_losses(dict.fromkeys(self._clients, self._row))
            self._keep([client for client in self._clients if math.isfinite(self._start[client])])

    @property
    def names(self) -> list[str]:
        """Names of the clients in the test."""
        return [self._engine.clients[client].name for client in self._clients]

    @property
    def measures(self) -> list[str]:
        """Losses by which rates can be compared, the better measure first.

        With few validation examples, the validation loss is often inconclusive, although the
        training loss shows which rates learn.
        """
        return list(self._trials)

    def run(self, rate: float) -> None:
        """Train on each client at this rate, and store the losses."""
        hyperparameters = Hyperparameters(rate, self._epochs)
        training = hyperparameters.apply_to(self._recipe.training)

        def assignment(client: int) -> Assignment:
            steps = count_steps(self._engine.clients[client].size, training)
            phases = (None,) * math.ceil(_STEPS / steps)
            return Assignment(Train(self._row, phases), hyperparameters=hyperparameters)

        trained, losses = {}, dict.fromkeys(self._clients, math.inf)
        for plan, reply in self._engine.train_clients(0, Assignments(self._clients, assignment)):
            if isinstance(reply, ClientError):
                log.debug("learning rate %g: %s", rate, reply)
                continue
            size = self._engine.clients[reply.client].size
            if reply.client in losses and validate_reply(reply, plan, 0, size) is None:
                trained[reply.client] = self._row - reply.delta
                losses[reply.client] = math.inf if reply.train_loss is None else reply.train_loss
        self._trials["training loss"][rate] = losses
        if self._start:
            self._trials["validation loss"][rate] = self._validation_losses(trained)

    def drop_failed(self) -> None:
        """Exclude clients that failed at every rate.

        Raises:
            RecipeError: No client is left.
        """
        trials = self._trials[self.measures[0]].values()
        self._keep(
            [
                client
                for client in self._clients
                if any(math.isfinite(losses[client]) for losses in trials)
            ]
        )

    def ratios(self, rates: Sequence[float], measure: str) -> NDArray[np.float64]:
        """Return ρ, rates × clients.

        Args:
            rates: Rates that were tried, ascending.
            measure: One of ``measures``.
        """
        trials = self._trials[measure]
        table = np.array([[trials[rate][client] for client in self._clients] for rate in rates])
        if measure == "validation loss":
            start = np.array([self._start[client] for client in self._clients])
        else:  # each client's loss at its smallest rate with a finite loss
            start = table[np.isfinite(table).argmax(axis=0), range(table.shape[1])]
        return np.asarray(table / np.maximum(start, _SMALLEST_LOSS), dtype=np.float64)

    def document(self, rates: Sequence[float]) -> dict[str, Any]:
        """Return ``start`` and ``trials`` of ``decisions.json``, with losses by client name.

        The loss of a failed client is None.
        """
        trials = [
            {
                "learning_rate": rate,
                **{
                    measure.replace(" ", "_"): self._by_name(losses[rate])
                    for measure, losses in self._trials.items()
                },
            }
            for rate in rates
        ]
        return {"start": self._by_name(self._start) if self._start else None, "trials": trials}

    def _by_name(self, losses: Losses) -> dict[str, float | None]:
        return {
            name: losses[client] if math.isfinite(losses[client]) else None
            for name, client in zip(self.names, self._clients, strict=True)
        }

    def _validation_losses(self, rows: Mapping[int, Tensor]) -> dict[int, float]:
        """Score adapters on the validation examples; inf for failures and missing clients."""
        losses = dict.fromkeys(self._clients, math.inf)
        served = Assignments[Served](list(rows), rows.__getitem__)
        for client, scores in self._engine.evaluate_clients(served):
            if isinstance(scores, ClientError):
                log.debug("range test: %s", scores)
            elif math.isfinite(loss := scores.get("validation_loss", math.inf)):
                losses[client] = loss
        return losses

    def _keep(self, clients: list[int]) -> None:
        """Continue with these clients only. Raises ``RecipeError`` if there are none."""
        if not clients:
            raise RecipeError(
                f"training.learning_rate: auto found no finite loss on {', '.join(self.names)};"
                " check these clients' examples, or set a number"
            )
        for client, name in zip(self._clients, self.names, strict=True):
            if client not in clients:
                log.warning(
                    "%s takes no part in the choice of the learning rate, because its training or "
                    "evaluation failed, or its loss was not finite",
                    name,
                )
        self._clients = clients


def drawn_clients(clients: Sequence[Client], seed: int) -> list[int]:
    """Draw up to four clients for a range test; return their indices, ascending.

    If some clients have validation examples, only these are candidates. Clients are drawn from the
    half of the candidates with the most training examples, because their losses are the least
    noisy.

    Args:
        clients: All clients.
        seed: Seed of the recipe.

    Raises:
        RecipeError: No client has training examples.
    """
    present = [index for index, client in enumerate(clients) if client.size]
    validated = [index for index in present if len(clients[index].validation)]
    candidates = sorted(validated or present, key=lambda index: -clients[index].size)
    if not candidates:
        raise RecipeError(
            "training.learning_rate: auto needs clients with training examples; set a number"
        )
    larger = candidates[: math.ceil(len(candidates) / 2)]
    generator = np.random.default_rng(derive(seed, "range test"))
    drawn = generator.choice(larger, min(_CLIENTS, len(larger)), replace=False)
    return sorted(int(index) for index in drawn)

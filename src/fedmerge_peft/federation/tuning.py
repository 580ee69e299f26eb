"""Values for the keys of ``training`` that are ``auto``, chosen before the first round.

The learning rate is chosen by a range test (after Smith 2017, arXiv 1506.01186, with separate
trials instead of a rising rate). A few clients train a new adapter at each rate of a geometric
grid, on the same examples in the same order. Rates are compared by the loss relative to the
client's own start:

ρ_ir = ℓ_i(θ_ir) / ℓ_i(θ_0)        client i, rate r, trained adapter θ_ir, new adapter θ_0

ℓ_i is the loss of the validation examples. If no client has any, it is the mean training loss, and
the denominator is its value at the smallest rate, which hardly changes the adapter.
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

from fedmerge_peft.data import Client
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.base import Engine
from fedmerge_peft.errors import ClientError, RecipeError
from fedmerge_peft.federation.reply_checks import validate_reply
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.training.hyperparameters import Hyperparameters, automatic_epochs
from fedmerge_peft.training.optimization import count_steps
from fedmerge_peft.training.plan import Train
from fedmerge_peft.util.seeds import derive

log = logging.getLogger(__name__)

Losses = Mapping[int, float]
"""Loss in nats, by client index; inf if the client failed."""

LADDERS: dict[str, tuple[float, ...]] = {
    "adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
}
"""Rates that a test may try, by optimizer."""
_GRID = slice(2, 7)
"""Rates that every test tries. The others are tried while the best rate is the last at its end."""
_MIDDLE = 4
"""Rate if no test is possible, or if no rate reduces the loss."""
_CLIENTS = 4
"""Most clients of a test."""
_STEPS = 30
"""Optimizer steps of a client at each rate, rounded up to whole rounds of local training. This is
about a fifth of a run's steps, enough to separate the rates."""
_SMALLEST_LOSS = 1e-8
"""Lower bound of the denominators, nats."""


@dataclass(frozen=True)
class Decisions:
    """The chosen values and their reasons."""

    document: Mapping[str, Mapping[str, Any]]
    """Content of ``decisions.json``: ``value``, ``reason`` and details, by key of ``training``.
    Empty if the recipe leaves no key open."""

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The chosen values."""
        return Hyperparameters.parse({key: entry["value"] for key, entry in self.document.items()})


def open_keys(recipe: Recipe) -> list[str]:
    """Return the keys of ``training`` that the recipe leaves to the federation."""
    training = recipe.training
    keys = ["epochs"] if training.epochs == "auto" and training.steps is None else []
    return [*keys, "learning_rate"] if training.learning_rate == "auto" else keys


def decide(recipe: Recipe, engine: Engine) -> Decisions:
    """Choose a value for each open key.

    The result follows from the recipe and the clients' losses: the same seed gives the same
    choice, on any number of ranks. Nothing is trained if the learning rate is a number.

    Args:
        recipe: Recipe of the run.
        engine: Clients. On several ranks, every rank calls this function.

    Raises:
        ClientError: All clients of the range test failed.
        RecipeError: The range test gives no finite loss.
    """
    document: dict[str, dict[str, Any]] = {}
    keys = open_keys(recipe)
    if "epochs" in keys:
        sizes = [client.size for client in engine.clients]
        epochs = automatic_epochs(recipe.training, recipe.rounds, sizes)
        document["epochs"] = {"value": epochs, "reason": "from the clients' median size"}
    if "learning_rate" in keys:
        epochs_only = Decisions(document).hyperparameters
        document["learning_rate"] = _learning_rate(recipe, engine, epochs_only)
        log.info("%s", describe(document)[0])
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
    ladder = LADDERS[recipe.training.optimizer]
    if recipe.privacy.mode != "none":
        reason = f"without a test, which privacy.mode: {recipe.privacy.mode} would not cover"
        return {"value": ladder[_MIDDLE], "reason": reason}
    begin = time.perf_counter()
    test = _RangeTest(recipe, engine, epochs)
    rates: list[float] = list(ladder[_GRID])
    names = ", ".join(engine.clients[client].name for client in test.clients)
    log.info("testing learning rates %g to %g on %s", rates[0], rates[-1], names)
    losses = {rate: test.losses(rate) for rate in rates}
    while True:
        start, ratios = test.ratios([losses[rate] for rate in rates])
        best = lowest(ratios)
        conclusive = start is None or reduces_loss(ratios[best])
        first, last = ladder.index(rates[0]), ladder.index(rates[-1])
        if conclusive and best == len(rates) - 1 and last + 1 < len(ladder):
            rates.append(ladder[last + 1])
            losses[rates[-1]] = test.losses(rates[-1])
        elif conclusive and best == 0 and first > 0:
            rates.insert(0, ladder[first - 1])
            losses[rates[0]] = test.losses(rates[0])
        else:
            break
    clients = f"{len(rates)} rates on {len(test.clients)} client{'s' * (len(test.clients) > 1)}"
    if conclusive:
        value, reason = rates[smallest_tied(ratios, best)], f"chosen from {clients}"
    else:
        middle = rates.index(ladder[_MIDDLE])
        value = rates[middle] if np.isfinite(ratios[middle]).all() else rates[best]
        reason = f"the middle of {clients}, none of which reduced the loss"
    return {
        "value": value,
        "reason": reason,
        "measure": "training loss" if start is None else "validation loss",
        "start": start and test.by_name(start),
        "trials": [
            {
                "learning_rate": rate,
                "relative_loss": _finite(float(ratio.mean())),
                "losses": test.by_name(losses[rate]),
            }
            for rate, ratio in zip(rates, ratios, strict=True)
        ],
        "seconds": time.perf_counter() - begin,
    }


# ---- the choice ----------------------------------------------------------------------------------


def lowest(ratios: NDArray[np.float64]) -> int:
    """Return the row with the lowest mean, the first of equal ones.

    Args:
        ratios: ρ, rates × clients, the rates ascending; inf for a failure.
    """
    return int(ratios.mean(axis=1).argmin())


def smallest_tied(ratios: NDArray[np.float64], best: int) -> int:
    """Return the smallest rate whose mean is within one standard error of the best rate's mean.

    The standard error is that of the paired differences ρ_ir − ρ_i,best over the clients; 0 for one
    client. This is the one-standard-error rule (Breiman et al. 1984, Classification and Regression
    Trees, section 3.4.3). The smaller rate is preferred, because a rate that is too large diverges
    later, while one that is slightly too small only needs more rounds.

    Args:
        ratios: As for ``lowest``.
        best: Row of the best rate.
    """
    for row in range(best):
        differences = ratios[row] - ratios[best]
        if np.isfinite(differences).all() and differences.mean() <= _standard_error(differences):
            return row
    return best


def reduces_loss(ratios: NDArray[np.float64]) -> bool:
    """Return whether a rate reduces the clients' loss by more than its standard error.

    Args:
        ratios: ρ at this rate, one number for each client.
    """
    return bool(np.isfinite(ratios).all() and (1 - ratios).mean() > _standard_error(ratios))


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


# ---- the clients' work ---------------------------------------------------------------------------


class _RangeTest:
    """Trials of learning rates on a few clients, from the adapter that the first round sends.

    Trials are work of round 0, so they share no random draws with the rounds of the run.
    """

    def __init__(self, recipe: Recipe, engine: Engine, epochs: Hyperparameters) -> None:
        self._recipe = recipe
        self._engine = engine
        self._epochs = epochs.epochs
        engine.backbone.set_base({})
        self._row = engine.strategy_context().fresh_row(0)
        self.clients = drawn_clients(engine.clients, recipe.seed)
        """Indices of the clients, ascending."""
        self._start: dict[int, float] | None = None
        if any(len(engine.clients[client].validation) for client in self.clients):
            self._start = self._validation_losses(dict.fromkeys(self.clients, self._row))
            self._keep([client for client in self.clients if math.isfinite(self._start[client])])

    def losses(self, rate: float) -> dict[int, float]:
        """Train on each client at this rate; return the losses."""
        hyperparameters = Hyperparameters(rate, self._epochs)
        training = hyperparameters.apply_to(self._recipe.training)

        def assignment(client: int) -> Assignment:
            steps = count_steps(self._engine.clients[client].size, training)
            phases = (None,) * math.ceil(_STEPS / steps)
            return Assignment(Train(self._row, phases), hyperparameters=hyperparameters)

        trained, losses = {}, dict.fromkeys(self.clients, math.inf)
        for plan, reply in self._engine.train_clients(0, Assignments(self.clients, assignment)):
            if isinstance(reply, ClientError):
                log.debug("learning rate %g: %s", rate, reply)
                continue
            size = self._engine.clients[reply.client].size
            if reply.client in losses and validate_reply(reply, plan, 0, size) is None:
                trained[reply.client] = self._row - reply.delta
                losses[reply.client] = reply.train_loss
        return losses if self._start is None else self._validation_losses(trained)

    def ratios(
        self, losses: Sequence[Losses]
    ) -> tuple[dict[int, float] | None, NDArray[np.float64]]:
        """Return ℓ_i(θ_0), None for training losses, and ρ, rates × clients.

        Clients that fail at every rate are excluded from this test.

        Args:
            losses: The clients' losses at each rate, the rates ascending.

        Raises:
            RecipeError: All clients fail at every rate.
        """
        self._keep(
            [
                client
                for client in self.clients
                if any(math.isfinite(trial[client]) for trial in losses)
            ]
        )
        table = np.array([[trial[client] for client in self.clients] for trial in losses])
        if self._start is None:
            start = table[np.isfinite(table).argmax(axis=0), range(table.shape[1])]
        else:
            start = np.array([self._start[client] for client in self.clients])
        return self._start, table / np.maximum(start, _SMALLEST_LOSS)

    def by_name(self, losses: Losses) -> dict[str, float | None]:
        """Return the losses of the remaining clients by name; None for a failure."""
        return {
            self._engine.clients[client].name: _finite(losses[client]) for client in self.clients
        }

    def _validation_losses(self, rows: Mapping[int, Any]) -> dict[int, float]:
        """Score adapters on the validation examples; inf for failures and missing clients."""
        losses = dict.fromkeys(self.clients, math.inf)
        for client, scores in self._engine.evaluate_clients(
            Assignments(list(rows), rows.__getitem__)
        ):
            if isinstance(scores, ClientError):
                log.debug("range test: %s", scores)
            elif math.isfinite(loss := scores.get("validation_loss", math.inf)):
                losses[client] = loss
        return losses

    def _keep(self, clients: list[int]) -> None:
        """Continue with these clients only. Raises ``RecipeError`` if there are none."""
        names = [self._engine.clients[client].name for client in self.clients]
        if not clients:
            raise RecipeError(
                [
                    f"training.learning_rate: auto found no finite loss on {', '.join(names)}; "
                    "check these clients' examples, or set a number"
                ]
            )
        for client in sorted(set(self.clients) - set(clients)):
            name = self._engine.clients[client].name
            log.warning("%s takes no part in the choice of the learning rate: it failed", name)
        self.clients = clients


def drawn_clients(clients: Sequence[Client], seed: int) -> list[int]:
    """Draw up to four clients for a range test; return their indices, ascending.

    Only clients with validation examples are drawn, if there are any, and of those the half with
    the most training examples, because their losses are the least noisy.

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
            ["training.learning_rate: auto needs clients with training examples; set a number"]
        )
    larger = candidates[: math.ceil(len(candidates) / 2)]
    generator = np.random.default_rng(derive(seed, "range test"))
    drawn = generator.choice(larger, min(_CLIENTS, len(larger)), replace=False)
    return sorted(int(index) for index in drawn)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

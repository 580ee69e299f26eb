"""The record of one round, and scores over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from fedmerge_peft.tasks.metrics import greater_is_better
from fedmerge_peft.util.ranges import Number, Text, Whole


def worst_tenth(metric: str, scores: Iterable[float]) -> float:
    """Return the mean of the ⌈n / 10⌉ worst of n scores. Ignore nan; return nan without scores.

    Args:
        metric: A task's metric, without ``test_`` or ``validation_``. It determines which scores
            are worse.
        scores: One score per client.
    """
    known = (score for score in scores if not math.isnan(score))
    ranked = sorted(known, reverse=not greater_is_better(metric))
    return fmean(ranked[: math.ceil(len(ranked) / 10)]) if ranked else math.nan


@dataclass(frozen=True)
class Scores:
    """Scores of one kind of adapter (served or finetuned) on each client's own examples."""

    metric: Text
    """The score that ``mean`` and ``worst`` refer to, such as ``test_accuracy``."""
    mean: Number
    """Unweighted mean over clients."""
    worst: Number
    """Mean over the worst tenth of the clients (``worst_tenth``)."""
    worst_client: Text
    """The client with the worst score; the first one if several have it."""
    worst_client_score: Number
    validation_loss: Number | None
    """Mean over the clients that have validation examples, nats; None if there are none. The best
    round is the one with the lowest value for the served adapters."""
    clients: dict[Text, dict[Text, Number]]
    """All scores by client: ``validation_loss``, ``test_loss``, ``test_accuracy`` and so on."""

    @classmethod
    def of(cls, metric: str, clients: Mapping[str, Mapping[str, float]]) -> Scores | None:
        """Aggregate the clients' scores; return None if no client has the metric.

        Args:
            metric: A task's metric, without ``test_`` or ``validation_``. Test scores are used if
                any client has them, otherwise validation scores.
            clients: Scores by client.
        """
        has_test = any(f"test_{metric}" in scores for scores in clients.values())
        key = f"{'test' if has_test else 'validation'}_{metric}"
        values = {name: scores[key] for name, scores in clients.items() if key in scores}
        if not values:
            return None
        worst = (min if greater_is_better(metric) else max)(values, key=values.__getitem__)
        losses = [
            scores["validation_loss"] for scores in clients.values() if "validation_loss" in scores
        ]
        return cls(
            metric=key,
            mean=fmean(values.values()),
            worst=worst_tenth(metric, values.values()),
            worst_client=worst,
            worst_client_score=values[worst],
            validation_loss=fmean(losses) if losses else None,
            clients={name: dict(scores) for name, scores in clients.items()},
        )


_INFINITE = ("Infinity", "-Infinity")
_NUMBERS = ("seconds", "train_loss", "gap", "weights_entropy", "update_norm", "epsilon")


def restore_scores(document: dict[str, Any]) -> dict[str, Any]:
    """Restore nan and infinite numbers of a document, in place, and return the document.

    A file has null in place of nan, and the text "Infinity" or "-Infinity" in place of an infinite
    number, such as the perplexity of a diverged model (``strict_json``). The texts become floats in
    scores and in the fields ``_NUMBERS``. null becomes nan in ``gap`` and in scores, except in the
    mean ``validation_loss``, which is null without validation examples. Other values are not
    changed.
    """
    for key in _NUMBERS:
        if document.get(key) in _INFINITE:
            document[key] = float(document[key])
    if "gap" in document and document["gap"] is None:
        document["gap"] = math.nan
    for value in document.values():
        if not isinstance(value, dict):
            continue
        if not isinstance(clients := value.get("clients"), dict):
            restore_scores(value)
            continue
        for scores, keys in [
            (value, ("mean", "worst", "worst_client_score", "validation_loss")),
            *((client, client) for client in clients.values() if isinstance(client, dict)),
        ]:
            for key in [key for key in keys if key in scores]:
                if scores[key] in _INFINITE:
                    scores[key] = float(scores[key])
                elif scores[key] is None and (scores is not value or key != "validation_loss"):
                    scores[key] = math.nan
    return document


@dataclass(frozen=True)
class RoundRecord:
    """One round: the server sent adapters, clients trained them, the server aggregated."""

    round: Whole
    """Number of the round, from 1."""
    rounds: Whole
    """Number of rounds in the recipe."""
    seconds: Number
    """Wall time of the round, including evaluation. Training and evaluation take almost no time if
    the engine has cached their results."""
    train_loss: Number | None
    """Mean loss of local training, nats, weighted by the clients' numbers of training examples.
    None if no client reports it, as in a federation of private sites."""
    served: Scores | None
    """Scores of the models served at the start of this round; for most methods these are the
    adapters as sent, before any local training. None if no client reports scores, as in rounds
    without evaluation and with private sites."""
    finetuned: Scores | None
    """Scores after this round's local training; the difference from ``served`` is the gain of
    finetuning. None if ``served`` is None, with ``evaluation.finetuned: false``, and for methods
    whose training does not start from the served model (``fedavg_ft``)."""
    gap: Number
    """Local-global gap: distance ‖·‖₂ between a client's trained adapter and the adapter that it
    would be sent next, mean over clients. For flora, fedex_lora and flexlora the distance is
    between updates ΔW, because their factors are not comparable across rounds."""
    weights_entropy: Number | None
    """Mean entropy of π after the round, in units of log d: 1 is uniform, 0 is one adapter per
    client. None if the strategy learns no weights, or has a single adapter."""
    adapter_mass: list[Number] | None
    """Mean weight of each adapter over the clients, after the round. The numbers sum to 1. None
    under the same conditions as ``weights_entropy``."""
    update_norm: Number | None
    """Median over clients of ‖δ_i‖₂, the norm of the shared part of an update. None for methods
    that compute no mean of updates."""
    bytes_down: Whole
    """Bytes of the adapters that the server sent to the clients of the round, in total."""
    bytes_up: Whole
    """Bytes of the adapters in accepted replies."""
    epsilon: Number | None
    """Largest ε spent by any client so far, at ``privacy.delta``, by all methods of the run. None
    without differential privacy."""
    noise: Text | None
    """Source of the noise for differential privacy: "simulation" if it derives from the recipe's
    seed and protects nobody, else "operating system". None without differential privacy."""
    clients: list[Text]
    """Clients whose replies were accepted."""
    failures: dict[Text, Text] = field(default_factory=dict)
    """Reason for each failed client that was skipped (``clients.failures: skip``)."""
    warnings: list[Text] = field(default_factory=list)
    """Warnings about the weights after the round, one sentence each, such as unused adapters."""
    decisions: list[Text] = field(default_factory=list)
    """Decisions of the strategy in this round, one sentence each, such as the number of groups."""

    def __str__(self) -> str:
        width = len(str(self.rounds))
        parts = [f"round {self.round:{width}}/{self.rounds}"]
        if self.train_loss is not None:
            parts.append(f"loss {self.train_loss:.3f}")
        if self.served is not None:
            worst = f"worst client {self.served.worst_client_score:.3f}"
            parts.append(f"served {self.served.mean:.3f} ({worst})")
        if self.finetuned is not None:
            parts.append(f"finetuned {self.finetuned.mean:.3f}")
        if self.weights_entropy is not None:
            parts.append(f"entropy {self.weights_entropy:.2f}")
        if self.epsilon is not None:
            parts.append(f"ε {self.epsilon:.2f}")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        return "  ".join([*parts, f"{self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """Return the record as one object of ``metrics.jsonl``."""
        return asdict(self)

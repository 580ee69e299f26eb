"""What is remembered of one round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from fedmerge_peft.tasks.metrics import greater_is_better


@dataclass(frozen=True)
class Scores:
    """One kind of adapter (as served, or finetuned), scored on each client's own examples."""

    metric: str
    """The score that ``mean`` and ``worst`` are of, such as ``test_accuracy``."""
    mean: float
    """Mean over clients, each counting the same."""
    worst: float
    """The worst client's."""
    worst_client: str
    validation_loss: float | None
    """Mean over clients, nats; what the best round is chosen by. None where clients hold no validation examples."""
    clients: dict[str, dict[str, float]]
    """All scores by client: ``validation_loss``, ``test_loss``, ``test_accuracy`` and so on."""

    @classmethod
    def of(cls, metric: str, clients: Mapping[str, Mapping[str, float]]) -> Scores | None:
        """Sum up; ``metric`` is a task's metric without its part. None where nothing was measured."""
        part = (
            "test"
            if any(f"test_{metric}" in scores for scores in clients.values())
            else "validation"
        )
        key = f"{part}_{metric}"
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
            worst=values[worst],
            worst_client=worst,
            validation_loss=fmean(losses) if losses else None,
            clients={name: dict(scores) for name, scores in clients.items()},
        )


@dataclass(frozen=True)
class RoundRecord:
    """One round: clients were sent adapters, trained them, and the server learned from the replies."""

    round: int
    """From 1."""
    rounds: int
    """How many the recipe asks for."""
    seconds: float
    """Wall time of the round, measuring included."""
    train_loss: float
    """Mean loss (nats) of local training, weighted by the clients' number of examples."""
    served: Scores | None
    """What clients were served with at the start of this round: for most methods the adapters just as they were sent, before any
    local training. None in rounds that do not measure."""
    finetuned: Scores | None
    """The same after this round's local training: the difference is what finetuning would gain. None for methods whose training does not
    start from what they serve (``fedavg_ft``)."""
    gap: float
    """The local-global gap: how far a client's trained adapter is from what it would be sent next, ‖·‖₂, mean over the clients. Between
    updates ΔW rather than adapters for flora and flexlora, whose factors do not compare from round to round."""
    weights_entropy: float | None
    """Mean entropy of π after the round, in units of log d: 1 is uniform, 0 is one adapter a client. None where no weights are learned."""
    adapter_mass: list[float] | None
    """Each adapter's share of the clients' weight after the round; sums to 1. None where no weights are learned."""
    update_norm: float | None
    """Median over the clients of ‖δ_i‖₂, of what of their updates is shared. None for methods that share no mean."""
    bytes_down: int
    """Bytes of adapters that the server sent, all clients together."""
    bytes_up: int
    """Bytes of adapters that came back, from those whose replies counted."""
    epsilon: float | None
    """ε at ``privacy.delta`` that the client who was asked most often has spent so far. None without differential privacy."""
    clients: list[str]
    """Whose replies counted."""
    failures: dict[str, str] = field(default_factory=dict)
    """Who was asked in vain (``clients.failures: skip``), and why, by client."""
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = len(str(self.rounds))
        parts = [f"round {self.round:{width}}/{self.rounds}", f"loss {self.train_loss:.3f}"]
        if self.served is not None:
            parts.append(f"served {self.served.mean:.3f} (worst {self.served.worst:.3f})")
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
        """As one object of ``metrics.jsonl``."""
        return asdict(self)

"""Plans: a client's work with the adapters that it receives.

In most methods, a client trains one adapter (``Train``). In other methods, it first chooses one of
several adapters (``Choose``), trains several adapters in turn (``InTurn``), or trains a mixture
(``Mixture``). A strategy may define another plan. All plans run in the same three phases, so an
engine can run the plans of several clients in parallel:

1. Compute the losses of the client's examples under each adapter of ``scored_rows``, without
   training.
2. Train the adapters of ``train_requests``, which depend on these losses.
3. Compute the client's result from the trained adapters (``result``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge_peft.recipe.schema import Logits
from fedmerge_peft.training.update_privacy import UpdatePrivacy, apply_update_privacy
from fedmerge_peft.util.seeds import derive
from fedmerge_peft.util.vectors import tensor_mismatch


@dataclass(frozen=True)
class Trained:
    """The outcome of training one adapter."""

    row: Tensor
    """The trained adapter, ``(P,)`` float32 on the CPU."""
    loss: float
    """Mean loss (nats) over the steps, without the proximal term and ``Alignment``."""
    steps: int
    """Number of optimizer steps in all phases, including steps that were skipped in fp16."""


@dataclass(frozen=True)
class Alignment:
    """A penalty that keeps the features of each class near a centroid (FedPAC: arXiv 2306.11867).

    An example with features f ``(d,)`` and label y has the penalty λ/d ‖f − c_y‖². The features
    are the input of the model's last layer.
    """

    centroids: Tensor
    """c, ``(classes, d)``; nan for classes without a centroid, which have no penalty."""
    strength: float
    """λ."""


@dataclass(frozen=True)
class TrainRequest:
    """One adapter to train."""

    job: Train
    seed: int
    """Seed of all random draws of the job."""


@dataclass(frozen=True)
class ClientResult:
    """Outcome of a client's plan."""

    deltas: Tensor
    """δ, sent minus trained, ``(k, P)``: a row for each adapter that was trained. ``Train.privacy``
    has been applied."""
    loss: float
    """Mean training loss (nats) of the shared adapter. For a mixture, the components' losses are
    weighted by their posterior q."""
    trained: Served
    """Adapter or mixture that the client would predict with now."""
    choice: int = 0
    """Index of the adapter that was trained, if the plan offered a choice."""
    weights: Tensor | None = None
    """A mixture's new π, ``(d,)``; None for other plans."""
    statistics: Tensor | None = None
    """Class statistics of ``Plan.measured_rows``, ``(rows, classes, d + 2)`` float32
    (``features.class_statistics``); None if there are none."""


class Plan(ABC):
    """Base class of plans; the module's docstring describes the phases."""

    @property
    @abstractmethod
    def sent(self) -> Tensor:
        """The adapters that are sent to the client, ``(k, P)``."""

    @property
    def returned_rows(self) -> int:
        """Number of rows of ``ClientResult.deltas``."""
        return len(self.sent)

    @property
    def scored_rows(self) -> Sequence[Tensor]:
        """Adapters ``(P,)`` whose per-example losses ``train_requests`` needs; none by default."""
        return ()

    def shared_rows(self, choice: int) -> slice:
        """Return the rows of ``sent`` that the client trained and shares with other clients.

        Args:
            choice: Index of the adapter that the client chose, if the plan offers a choice.
        """
        return slice(None)

    def validated_rows(self, trained: Served) -> Sequence[Tensor]:
        """Return the adapters ``(P,)`` whose validation losses a reply may have; none by default.

        They are the served adapter, the adapter after training and, if the plan has one, another
        adapter to compare (``Reply.validation``).

        Args:
            trained: The client's model after training (``ClientResult.trained``).
        """
        return ()

    def mismatch(self, choice: int, weights: Tensor | None) -> str | None:
        """Return the reason why a reply's choice or weights do not fit this plan, or None."""
        return None

    @property
    def statistics_shape(self) -> tuple[int, int, int] | None:
        """Shape of ``ClientResult.statistics``; None if the plan measures no adapter."""
        return None

    def measured_rows(self, trained: Sequence[Trained]) -> Sequence[Tensor]:
        """Return the adapters ``(P,)`` whose class statistics the result contains.

        ``features.class_statistics`` computes the statistics after the training.
        """
        return ()

    @abstractmethod
    def train_requests(self, losses: Sequence[Tensor], seed: int) -> Sequence[TrainRequest]:
        """Return the jobs of the second phase.

        Args:
            losses: For each of ``scored_rows``, the summed loss (nats) of each training example,
                ``(n,)``.
            seed: Seed of all random draws of the plan, from which the seeds of the jobs derive.
        """

    @abstractmethod
    def result(
        self, trained: Sequence[Trained], losses: Sequence[Tensor], seed: int
    ) -> ClientResult:
        """Return the client's result, given the outcomes of the requests in their order."""


def _adapters(*models: Served | None) -> Sequence[Tensor]:
    """Return the models that are single adapters, ``(P,)`` each."""
    return [model for model in models if isinstance(model, Tensor)]


@dataclass(frozen=True)
class Train(Plan):
    """Train one adapter on the client's examples: min_θ ℓ(θ) + μ ‖θ − anchor‖²."""

    row: Tensor
    """θ as sent, ``(P,)``."""
    phases: tuple[Tensor | None, ...] = (None,)
    """Phases of local training. Each is a mask ``(P,)`` of the trained columns; None for all."""
    proximal: float | None = None
    """μ; None for the recipe's ``training.proximal``."""
    anchor: Tensor | None = None
    """Center of the proximal term, ``(P,)``; None for ``row``."""
    example_weights: Tensor | None = None
    """The weight of each of the client's training examples, ``(n,)``; None if all are 1."""
    privacy: UpdatePrivacy | None = None
    """Clipping and noise of the update before it leaves the client; None to send it unchanged. The
    adapter that the client keeps is not changed."""
    alignment: Alignment | None = None
    """Penalty on the features; None if there is none."""
    logits: Logits | None = None
    """``training.logits`` for this job (``label_logits.py``); None for the recipe's value."""
    compared: Tensor | None = None
    """Another adapter ``(P,)`` whose validation loss the client also reports, or None."""

    @property
    def sent(self) -> Tensor:
        return self.row[None] if self.compared is None else torch.stack([self.row, self.compared])

    @property
    def returned_rows(self) -> int:
        return 1

    def shared_rows(self, choice: int) -> slice:
        return slice(1)

    def train_requests(self, losses: Sequence[Tensor], seed: int) -> Sequence[TrainRequest]:
        return [TrainRequest(self, seed)]

    def result(
        self, trained: Sequence[Trained], losses: Sequence[Tensor], seed: int
    ) -> ClientResult:
        (outcome,) = trained
        delta = self.row - outcome.row
        if self.privacy is not None:
            noise_seed = derive(seed, "release")
            delta = apply_update_privacy(delta, self.privacy, self.phases, noise_seed)
        return ClientResult(delta[None], outcome.loss, outcome.row)

    def validated_rows(self, trained: Served) -> Sequence[Tensor]:
        return _adapters(self.row, trained, self.compared)


@dataclass(frozen=True)
class MeasuredTrain(Train):
    """Train one adapter, and measure its features by class before and after the training."""

    statistics_shape: tuple[int, int, int] = (2, 0, 2)
    """``(2, classes, d + 2)``: the adapter as sent, then as trained."""

    def measured_rows(self, trained: Sequence[Trained]) -> Sequence[Tensor]:
        return self.row, trained[0].row


@dataclass(frozen=True)
class InTurn(Plan):
    """Train several adapters, each from its own row. The first adapter is shared."""

    jobs: tuple[Train, ...]
    joined: bool = False
    """True if the client's trained model has the updates of all jobs: the row of the last job minus
    the sum of all δ. Otherwise, it is the adapter that the last job trained."""
    compared: Tensor | None = None
    """Another adapter ``(P,)`` whose validation loss the client also reports, or None."""

    @property
    def sent(self) -> Tensor:
        rows = [job.row for job in self.jobs]
        return torch.stack(rows if self.compared is None else [*rows, self.compared])

    @property
    def returned_rows(self) -> int:
        return len(self.jobs)

    def shared_rows(self, choice: int) -> slice:
        return slice(1)

    def train_requests(self, losses: Sequence[Tensor], seed: int) -> Sequence[TrainRequest]:
        return [
            TrainRequest(job, derive(seed, "job", number) if number else seed)
            for number, job in enumerate(self.jobs)
        ]

    def result(
        self, trained: Sequence[Trained], losses: Sequence[Tensor], seed: int
    ) -> ClientResult:
        pairs = zip(self.jobs, trained, strict=True)
        deltas = torch.stack([job.row - outcome.row for job, outcome in pairs])
        model = self.jobs[-1].row - deltas.sum(dim=0) if self.joined else trained[-1].row
        return ClientResult(deltas, trained[0].loss, model)

    def validated_rows(self, trained: Served) -> Sequence[Tensor]:
        return _adapters(self.jobs[-1].row, trained, self.compared) if self.joined else ()


@dataclass(frozen=True)
class Choose(Plan):
    """Train the adapter with the lowest loss on the client's training examples, argmin_j ℓ_i(Θ_j).

    This is IFCA's cluster estimate (Ghosh et al. 2020, arXiv 2006.04088, algorithm 1). Ties are
    broken at random. Without a head, all adapters tie in the first round, because LoRA's B = 0
    makes them the same function.
    """

    rows: Tensor
    """The adapters to choose from, ``(d, P)``."""

    @property
    def sent(self) -> Tensor:
        return self.rows

    @property
    def returned_rows(self) -> int:
        return 1

    @property
    def scored_rows(self) -> Sequence[Tensor]:
        return list(self.rows)

    def shared_rows(self, choice: int) -> slice:
        return slice(choice, choice + 1)

    def mismatch(self, choice: int, weights: Tensor | None) -> str | None:
        if type(choice) is int and 0 <= choice < len(self.rows):
            return None
        return f"it chose adapter {choice}, expected 0 to {len(self.rows) - 1}"

    def train_requests(self, losses: Sequence[Tensor], seed: int) -> Sequence[TrainRequest]:
        return [TrainRequest(Train(self.rows[self._choice(losses, seed)]), seed)]

    def result(
        self, trained: Sequence[Trained], losses: Sequence[Tensor], seed: int
    ) -> ClientResult:
        (outcome,) = trained
        choice = self._choice(losses, seed)
        delta = self.rows[choice] - outcome.row
        return ClientResult(delta[None], outcome.loss, outcome.row, choice)

    def _choice(self, losses: Sequence[Tensor], seed: int) -> int:
        sums = torch.stack([row.double().sum() for row in losses])
        sums = torch.where(sums.isnan(), torch.inf, sums)
        lowest = torch.nonzero(sums == sums.min()).flatten()
        return int(lowest[derive(seed, "choice") % len(lowest)])


@dataclass(frozen=True)
class Mixture(Plan):
    """Mixture p(y | x) = Σ_k π_k p_k(y | x). As a plan, it is one EM step on the training examples.

    FedEM's client step (Marfoq et al. 2021, arXiv 2108.10252, section 3), over examples (x, y):

    E:  q(k | x, y) ∝ π_k · exp(−ℓ(θ_k; x, y))
    M:  π_k ← mean of q(k | x, y);  θ_k ← local training on q(k | x, y) · ℓ(θ_k; x, y)

    The reported loss is the mean of Σ_k q(k | x, y) ℓ(θ_k; x, y): the sum of the components'
    training losses, which are weighted by q.
    """

    rows: Tensor
    """The components, ``(d, P)``."""
    weights: Tensor
    """π, ``(d,)``; sums to 1."""

    @property
    def sent(self) -> Tensor:
        return self.rows

    @property
    def scored_rows(self) -> Sequence[Tensor]:
        return list(self.rows)

    def mismatch(self, choice: int, weights: Tensor | None) -> str | None:
        if weights is None:
            return "its weights are missing"
        if (problem := tensor_mismatch(weights, tuple(self.weights.shape))) is not None:
            return f"its weights are {problem}"
        if bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-3:
            return "its weights are negative or do not sum to 1"
        return None

    def train_requests(self, losses: Sequence[Tensor], seed: int) -> Sequence[TrainRequest]:
        posterior = self._posterior(losses)
        return [
            TrainRequest(
                Train(row, example_weights=weights.float()), derive(seed, "component", number)
            )
            for number, (row, weights) in enumerate(zip(self.rows, posterior, strict=True))
        ]

    def result(
        self, trained: Sequence[Trained], losses: Sequence[Tensor], seed: int
    ) -> ClientResult:
        rows = torch.stack([outcome.row for outcome in trained])
        loss = sum(outcome.loss for outcome in trained)
        weights = self._posterior(losses).mean(dim=1).to(self.weights)
        return ClientResult(self.rows - rows, loss, Mixture(rows, weights), weights=weights)

    def _posterior(self, losses: Sequence[Tensor]) -> Tensor:
        """Compute q, ``(d, n)`` float64."""
        log_likelihoods = -torch.stack([row.double() for row in losses])
        return torch.softmax(self.weights.double().log()[:, None] + log_likelihoods, dim=0)


Served = Tensor | Mixture
"""Model that a client predicts with: one adapter ``(P,)``, or a mixture of several."""

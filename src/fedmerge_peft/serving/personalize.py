"""Merge an adapter for a newcomer, a client outside the federation, from a run's soup.

The soup Θ is fixed; only the newcomer's d logits w are learned, on its own examples:
min_w ℓ(softmax(w) Θ). With θ = Σ_j π_j Θ_j the chain rule gives
∂ℓ/∂w_j = π_j ⟨Θ_j − θ, ∂ℓ/∂θ⟩. FedMerge's server follows the same gradient (arXiv 2504.06768),
estimated from a round's update; here it is exact.

ℓ is computed with the recipe's ``training.logits``, as in the run. With ``serving.label_prior``,
the newcomer's own label prior is part of its adapter, as it is for the clients of the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.data import FederatedData, Indices
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import RunError
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.runs.passed_model import check_model, with_model
from fedmerge_peft.serving.merged_adapter import load_shared_state
from fedmerge_peft.serving.newcomer_data import newcomer_prior, read_newcomer
from fedmerge_peft.serving.personalized import LEARNED, Alternative, Personalized
from fedmerge_peft.strategies.server_step import weights_gradient
from fedmerge_peft.tasks.in_memory import take_model
from fedmerge_peft.training.accelerator import choose_device, choose_precision
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.optimization import count_steps
from fedmerge_peft.training.plan import Train
from fedmerge_peft.util.seeds import derive

if TYPE_CHECKING:
    from torch import nn

    from fedmerge_peft.data.in_memory import Parts
    from fedmerge_peft.tasks.base import ComputeMetrics


_PATIENCE = 5
"""Steps without improvement after which learning stops."""
_MIN_IMPROVEMENT = 1e-3
"""Least decrease of the loss that counts as improvement, nats."""
_UNIFORM_SHARE = 0.1
"""Share of the initial weights that is spread evenly over all adapters."""
_MIN_DISTANCE = 0.1
"""Total variation distance below which two rows of π count as the same choice."""
_MAX_LOCAL_STEPS = 500
"""Limit on the optimizer steps of local training. The first round may exceed it."""
_MIN_WEIGHT = 1e-6

Objective = Callable[[Tensor], tuple[float, Tensor]]
"""Function from an adapter ``(P,)`` to the mean training loss (nats) and its gradient ``(P,)``."""


def personalize(
    run: RunDirectory | Path | str,
    data: Path | str | Parts,
    *,
    name: str | None = None,
    best: bool = False,
    test_fraction: float = 0.3,
    max_train: int | None = None,
    local: bool = True,
    seed: int | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    metrics: ComputeMetrics | None = None,
) -> Personalized:
    """Learn a newcomer's merging weights on its own examples, and compare them with alternatives.

    The run's soup is not changed.

    Args:
        run: A run of a strategy with a ``shared_soup``. If the soup has a single adapter, there are
            no weights to learn, and the adapter is only compared with the alternatives.
        data: The newcomer's examples: the path of a csv, tsv, json, jsonl, parquet or arrow file,
            or of a folder as in a recipe's ``data.path``; or a ``datasets.Dataset``, a pandas
            frame, an Arrow table, a ``DatasetDict`` or a pair (train, test). The columns are named
            as in the run's task; the recipe's filter is not applied.
        name: The newcomer's name. Default: the file's name without its suffix, or ``newcomer`` for
            data in memory.
        best: Use the soup of the best round, even if the run serves its last round.
        test_fraction: Fraction of the examples held out for testing. If it is 0, or if there are
            fewer than three examples, none is held out. If the data have the recipe's split
            column or several splits, the fraction is ignored, the test split is used for testing,
            and the training and validation splits for training.
        max_train: Limit on training examples, drawn at random. Default: no limit.
        local: Also train an adapter from scratch, for at most the recipe's rounds.
        seed: Seed of the held-out examples and of local training. Default: the recipe's.
        model: The run's model, if a Python program passed it to ``federate`` and it is no longer in
            memory.
        tokenizer: As in ``federate``.
        processor: As in ``federate``.
        metrics: As in ``federate``, for the scores of all methods.

    Raises:
        RunError: The run or its round does not exist; a newcomer cannot merge the adapters of this
            run; the adapters do not fit the model that is loaded now; ``model`` is not the run's
            model; or the clients' label counts, from which the label prior is estimated, are
            missing.
        BackboneError: The model cannot be loaded, or comes with code to which the caller did not
            consent (``trust_remote_code`` of ``load_run``).
        DataError: The data cannot be read, do not fit the task, contain an unknown label, or leave
            no training examples; or ``test_fraction`` is negative or at least 1.
        DeviceError: The device is not available.
        RecipeError: ``metrics`` does not return a mapping of new names to numbers.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory.open(run)
    passed = take_model(model, tokenizer, processor)
    check_model(run, with_model(run.recipe, passed))
    recipe = _recipe(run)
    soup, known = run.state(best=best)
    _check_mergeable(run, soup)
    seed = run.recipe.seed if seed is None else seed
    table, newcomer = read_newcomer(run, data, name, test_fraction, max_train, seed)
    engine = LocalEngine.from_data(recipe, FederatedData(table, [newcomer]))
    if metrics is not None:
        engine.add_metrics(metrics)
    load_shared_state(engine.backbone, soup, run)
    clients = run.clients.index.tolist()
    prior = newcomer_prior(run, soup.layout, engine.label_counts())
    comparison = _Comparison(engine, soup, prior)
    logits = comparison.learn(known, clients)
    if local:
        comparison.train_locally(seed)
    nearest = clients[int((known - torch.softmax(logits, dim=0)).abs().sum(dim=1).argmin())]
    sizes = {"train": newcomer.size, "test": len(newcomer.test)}
    return Personalized(
        run,
        run.round(best=best),
        newcomer.name,
        soup,
        logits,
        tuple(comparison.methods),
        nearest,
        sizes,
        run.adapter_config,
        prior,
    )


def learn_logits(
    rows: Tensor, start: Tensor, objective: Objective, *, steps: int = 25, lr: float = 0.5
) -> tuple[Tensor, float]:
    """Minimize ℓ(softmax(w) Θ) over w in full batches by Rprop (Riedmiller & Braun 1993).

    The gradient has no noise. Rprop, which uses the signs of the gradient and one step size per
    logit, therefore needs fewer evaluations than Adam, at any scale of the loss.

    Args:
        rows: Θ, ``(d, P)``.
        start: Initial π, ``(d,)``. A small share of every adapter is mixed in, because the gradient
            of a softmax vanishes where a weight is 0.
        objective: ℓ and its gradient at an adapter.
        steps: Limit on evaluations of the objective, at least 1; learning stops earlier after
            several evaluations without improvement.
        lr: Initial step size, in logits.

    Returns:
        The logits ``(d,)`` float64 with the lowest loss of all evaluated logits, and this loss. The
        initial logits are evaluated too.
    """
    smoothed = (1 - _UNIFORM_SHARE) * start.double() + _UNIFORM_SHARE / len(start)
    logits = smoothed.log().requires_grad_()
    optimizer = torch.optim.Rprop([logits], lr=lr, step_sizes=(1e-3, 2.0))
    best, lowest = logits.detach().clone(), math.inf
    reference, idle = math.inf, 0
    for _ in range(steps):
        weights = torch.softmax(logits.detach(), dim=0)
        loss, gradient = objective(weights.to(rows) @ rows)
        if loss < lowest:
            best, lowest = logits.detach().clone(), loss
        improved = loss < reference - _MIN_IMPROVEMENT
        reference, idle = (loss, 0) if improved else (reference, idle + 1)
        if idle == _PATIENCE:
            break
        logits.grad = weights_gradient(rows, weights[None], gradient[None])[0].to(logits)
        optimizer.step()
    return best, lowest


def distinct(known: Tensor, covered: Tensor, most: int = 16) -> list[int]:
    """Select rows of ``known`` ``(m, d)`` that differ from each other and from all of ``covered``.

    Both contain rows of π; ``covered`` has the shape ``(k, d)``. Rows differ if their total
    variation distance ½ ‖π − π'‖₁ is at least 0.1.

    Returns:
        Indices of at most ``most`` rows. Each row has, of all rows, the largest distance to
        ``covered`` and the rows selected before it.
    """
    chosen: list[int] = []
    distance = torch.cdist(known, covered, p=1).amin(dim=1) / 2
    while len(chosen) < most and float(distance.max()) >= _MIN_DISTANCE:
        chosen.append(int(distance.argmax()))
        distance = distance.minimum((known - known[chosen[-1]]).abs().sum(dim=1) / 2)
    return chosen


class _Comparison:
    """Comparison of methods to obtain an adapter, on the newcomer's examples."""

    def __init__(self, engine: LocalEngine, soup: AdapterSoup, prior: Tensor) -> None:
        self.engine = engine
        self.newcomer = engine.clients[0]
        self.rows = soup.rows
        self.prior = prior
        """Label prior, ``(P,)``; added to adapters for testing, but not for training."""
        self.objective = engine.runtime.objective(
            engine.recipe.training.logits, self.newcomer.train
        )
        """Training loss of the newcomer."""
        self.methods: list[Alternative] = []
        batches = (engine.runtime.collate(chunk)["labels"] for chunk in self._chunks())
        self._count = sum(self.objective.divisor(engine.task, labels) for labels in batches)

    def learn(self, known: Tensor, clients: list[str]) -> Tensor:
        """Evaluate fixed weights, then learn logits from the best of them as the start.

        Args:
            known: π of the run's clients, ``(m, d)``.
            clients: Names of these clients.

        Returns:
            The logits, ``(d,)`` float32, with mean 0.
        """
        adapters = len(self.rows)
        singles, uniform = torch.eye(adapters), torch.full((1, adapters), 1 / adapters)
        chosen = distinct(known, torch.cat([singles, uniform]))
        candidates = [
            self._best_of("mean adapter", uniform, [""]),
            self._best_of(
                "best single adapter", singles, [f"adapter {number}" for number in range(adapters)]
            ),
        ]
        if chosen:
            closest, _ = min(candidates, key=lambda candidate: candidate[1])
            nearest = int(torch.cdist(known, closest[None], p=1).argmin())
            chosen += [nearest] if nearest not in chosen else []
            candidates.append(
                self._best_of(
                    "a client's weights", known[chosen], [clients[number] for number in chosen]
                )
            )
        start, lowest = min(candidates, key=lambda candidate: candidate[1])
        begin = time.perf_counter() - sum(method.seconds for method in self.methods)
        logits, loss = learn_logits(self.rows, start, self._objective)
        if lowest < loss:  # the start is almost one-hot, which a softmax approaches only slowly
            logits, loss = start.double().clamp_min(_MIN_WEIGHT).log(), lowest
        logits = (logits - logits.mean()).float()
        row = torch.softmax(logits, dim=0).to(self.rows) @ self.rows
        self._add(LEARNED, "", loss, row, begin)
        return logits

    def train_locally(self, seed: int) -> None:
        """Train a new adapter on the newcomer's examples alone.

        Training takes the recipe's rounds, or fewer to stay within ``_MAX_LOCAL_STEPS``, but at
        least one.
        """
        begin = time.perf_counter()
        engine, training = self.engine, self.engine.recipe.training
        rounds = min(
            engine.recipe.rounds,
            max(1, _MAX_LOCAL_STEPS // count_steps(self.newcomer.size, training)),
        )
        row = engine.strategy_context().fresh_row(0)
        for number in range(1, rounds + 1):
            purpose = derive(seed, "train", number, self.newcomer.name)
            job = Job(Train(row), self.newcomer.train, purpose)
            row = train(engine.runtime, training, [job])[0].row
        self._add(
            "local training", f"{rounds} round{'s' * (rounds > 1)}", self._loss(row), row, begin
        )

    def _best_of(self, name: str, weights: Tensor, details: list[str]) -> tuple[Tensor, float]:
        """Add the row of weights with the lowest loss as one method; return the row and its loss.

        Args:
            name: Name of the method.
            weights: k rows of π, ``(k, d)``.
            details: ``Alternative.detail`` for each row.
        """
        begin = time.perf_counter()
        losses = [self._loss(row.to(self.rows) @ self.rows) for row in weights]
        best = int(np.argmin(losses))
        self._add(name, details[best], losses[best], weights[best].to(self.rows) @ self.rows, begin)
        return weights[best], losses[best]

    def _add(self, name: str, detail: str, loss: float, row: Tensor, begin: float) -> None:
        seconds = time.perf_counter() - begin
        test, size = self.newcomer.test, self.engine.recipe.evaluation.batch_size
        scores = evaluate(self.engine.runtime, row + self.prior, test, size) if len(test) else {}
        self.methods.append(Alternative(name, detail, loss, scores, seconds))

    def _loss(self, row: Tensor) -> float:
        # The same batches as in _objective, so that the losses are exactly comparable.
        size = self.engine.recipe.training.batch_size
        losses = example_losses(self.engine.runtime, row, self.newcomer.train, size, self.objective)
        return float(losses.double().sum()) / self._count

    def _objective(self, row: Tensor) -> tuple[float, Tensor]:
        slot = AdapterSlot(self.engine.backbone, row)
        self.engine.backbone.eval()
        loss = accumulate(self.engine.runtime, slot, [self._chunks()], objectives=[self.objective])
        return float(loss), slot.gradient[0].cpu()

    def _chunks(self) -> list[Indices]:
        """Return the rows of the training examples in batches of ``training.batch_size``."""
        rows, size = self.newcomer.train, self.engine.recipe.training.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def _check_mergeable(run: RunDirectory, soup: AdapterSoup) -> None:
    strategy = run.recipe.strategy
    sections = STRATEGIES.sections().items()
    mergeable = " or ".join(name for name, section in sections if section.shared_soup)
    if soup.own is not None and soup.own.private:
        raise RunError(
            f"{run.path}: parts of its adapters are private to the clients ({strategy.name}), and "
            f"a new client has none; use a run of {mergeable} with strategy.head: shared"
        )
    if strategy.shared_soup:
        return
    if len(soup) == 1:
        raise RunError(
            f"{run.path} has one adapter for all clients ({strategy.name}), so there are no "
            "weights to learn; fedmerge export --client NAME (run.save_adapter in Python) writes "
            f"it. To personalize, run {mergeable} with several adapters, such as "
            "strategy.adapters=5"
        )
    raise RunError(
        f"{run.path} is a run of {strategy.name}, whose adapters a new client cannot merge; "
        f"use a run of {mergeable}"
    )


def _recipe(run: RunDirectory) -> Recipe:
    """Return the run's recipe with the text format found in its data.

    fp16 is disabled, because its gradients would need a scaler.
    """
    recipe, training = run.trusted_recipe, run.training
    if choose_precision(training.mixed_precision, choose_device(training.device)) == "fp16":
        training = training.model_copy(update={"mixed_precision": "no"})
    task = recipe.task.with_format(run.task["format"])
    return recipe.model_copy(update={"task": task, "training": training})

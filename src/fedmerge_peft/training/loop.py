"""Local training of one adapter, or of several adapters in the same forward passes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.objective import Objective
from fedmerge_peft.training.optimization import (
    count_steps,
    learning_rate,
    make_optimizer,
    make_schedule,
    micro_batches,
    mixes_rows,
    new_scaler,
)
from fedmerge_peft.training.plan import Train, Trained
from fedmerge_peft.training.runtime import Runtime
from fedmerge_peft.util.seeds import derive, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

Adapters = AdapterSlot | AdapterStack


@dataclass(frozen=True)
class Job:
    """One adapter to train, on one client's examples."""

    train: Train
    indices: Indices
    """The client's rows of the table."""
    seed: int
    """Seed of the order of examples. The seed of the dropout masks derives from this seed and those
    of all other jobs in the same call of ``train``."""
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    """Values for the keys of ``training`` that are auto; they may differ between jobs in one pass.
    """


@dataclass
class _TrainState:
    """A job in progress."""

    job: Job
    training: TrainingRecipe
    """The recipe's section with the job's hyperparameters."""
    steps: int
    """Optimizer steps in each phase."""
    row: Tensor
    """θ, ``(P,)`` on the device."""
    anchor: Tensor | None
    """Center of the proximal term, ``(P,)``; None without a proximal term."""
    proximal: float
    """μ; 0 without a proximal term."""
    example_weights: Tensor | None
    """Weight of each row of the whole table, ``(n,)``; None if all are 1."""
    objective: Objective
    """Training loss of the client."""
    stepped: bool = False
    """True if a phase has ended in which at least one step was not skipped (``has_stepped``)."""
    losses: list[Tensor] = field(default_factory=list)
    """Mean loss (nats) of each step so far."""


def train(runtime: Runtime, training: TrainingRecipe, jobs: Sequence[Job]) -> list[Trained]:
    """Train adapters, each on its own examples: min_θ ℓ(θ) + μ ‖θ − anchor‖².

    For a classifier, ``Objective`` defines the class weights and the logits' offsets in the loss ℓ.

    A single job uses the backbone's own slot, with plain PEFT. Several jobs share each forward pass
    (``AdapterStack``); without dropout, the results equal sequential training up to rounding.
    Each job has its own examples in its own order, mean loss, gradient clipping, learning rate and,
    in fp16, loss scale. A job leaves the batch after its last step.

    Dropout masks are drawn for a whole pass, from the seeds of all of its jobs. The same jobs get
    the same masks, but a job gets different masks in a pass with other jobs.

    Args:
        runtime: Model, task and examples. Several jobs need a model for which
            ``stacking_obstacle`` returns None.
        training: Optimizer, schedule, batch size and other settings.
        jobs: Adapters to train, at least one.

    Returns:
        The outcome of each job, in the same order.

    Raises:
        RecipeError: As in ``client_offset``, ``captured_features`` and ``PrefixCache.prepare``.
        ValueError: The learning rate is auto, or the epochs are auto and ``steps`` is not set, and
            a job has no value for this key.
    """
    backbone = runtime.backbone
    if runtime.cache is not None:
        with runtime.accelerator.autocast():
            runtime.cache.prepare(np.concatenate([job.indices for job in jobs]))
    states = [_start(runtime, training, job) for job in jobs]
    backbone.train()
    first, *others = (job.seed for job in jobs)
    threads = runtime.cpu_threads(training.batch_size * len(jobs))
    with threads, seeded(derive(first, "dropout", *others), backbone.device):
        for phase in range(max(len(job.train.phases) for job in jobs)):
            present = [state for state in states if phase < len(state.job.train.phases)]
            present.sort(key=_group_key)
            _train_phase(runtime, training.max_grad_norm, present, phase, shared=len(jobs) > 1)
    backbone.eval()
    if overflowed := sum(state.steps > 0 and not state.stepped for state in states):
        log.warning(
            "%d of %d adapters did not change, because the gradients overflowed in fp16 in each "
            "step; use training.mixed_precision=bf16 or no, or more steps in a round",
            overflowed,
            len(states),
        )
    return [
        Trained(
            state.row.to("cpu", copy=True),
            float(torch.stack(state.losses).mean()),
            len(state.losses),
        )
        for state in states
    ]


def _start(runtime: Runtime, training: TrainingRecipe, job: Job) -> _TrainState:
    training = job.hyperparameters.apply_to(training)
    plan, row = job.train, job.train.row.to(runtime.device)
    proximal = training.proximal if plan.proximal is None else plan.proximal
    anchor = (row if plan.anchor is None else plan.anchor.to(runtime.device)) if proximal else None
    weights = None
    if plan.example_weights is not None:
        weights = torch.zeros(len(runtime.examples))
        weights[torch.from_numpy(job.indices)] = plan.example_weights
    steps = count_steps(len(job.indices), training)
    objective = runtime.objective(plan.logits or training.logits, job.indices)
    return _TrainState(job, training, steps, row, anchor, proximal, weights, objective)


def _group_key(state: _TrainState) -> tuple[int, float]:
    """Return a sort key: jobs with more steps come first, then jobs with lower learning rates."""
    return -state.steps, learning_rate(state.training)


def _train_phase(
    runtime: Runtime,
    max_grad_norm: float | None,
    states: list[_TrainState],
    phase: int,
    *,
    shared: bool,
) -> None:
    """Run one phase of local training for all jobs, which are sorted by ``_group_key``."""
    adapters: Adapters
    if shared:
        adapters = AdapterStack(runtime.backbone, torch.stack([state.row for state in states]))
    else:
        adapters = AdapterSlot(runtime.backbone, states[0].row)
    batches = [
        micro_batches(state.job.indices, state.training, state.job.seed, phase) for state in states
    ]
    groups = list(_optimizer_groups(adapters, states, runtime.accelerator))
    in_fp16 = groups[0].scaler is not None  # each adapter then has its own group
    all_groups = tuple(groups)
    rules = GradientRules(states, phase, max_grad_norm, runtime.device)
    with adapters.applied():
        for step in range(states[0].steps):
            while groups[-1].steps == step:
                _leave(adapters, states, groups.pop())
            active = states[: len(adapters)]
            chunks = [next(order) for order in batches[: len(adapters)]]
            losses = accumulate(
                runtime,
                adapters,
                chunks,
                [state.example_weights for state in active],
                [state.job.train.alignment for state in active],
                [state.objective for state in active],
                [group.scaler for group in groups] if in_fp16 else None,
            )
            for state, loss in zip(active, losses, strict=True):
                state.losses.append(loss)
            for group in groups:
                if group.scaler is not None:
                    group.scaler.unscale_(group.optimizer)
            rules.apply(adapters)
            before = adapters.rows.clone() if rules.columns is not None else None
            for group in groups:
                group.step()
            if before is not None:
                rules.restore(adapters, before)
            adapters.gradient.zero_()
    for state, row in zip(states, adapters.rows, strict=False):
        state.row = row.clone()
    for group in all_groups:
        for state in states[group.rows]:
            state.stepped |= group.has_stepped()


def _leave(adapters: Adapters, states: Sequence[_TrainState], group: _OptimizerGroup) -> None:
    """Remove the adapters of a group from the batch after their last step."""
    rows = adapters.rows[group.rows]
    for state, row in zip(states[group.rows], rows, strict=True):
        state.row = row.clone()
    adapters.truncate(group.rows.start)


@dataclass(frozen=True)
class _OptimizerGroup:
    """Adapters with the same number of steps and learning rate, which share an optimizer.

    In fp16, and with an optimizer for which ``mixes_rows`` is True, each adapter has its own group.
    """

    rows: slice
    steps: int
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler | None
    """Gradient scaler of the group's only adapter in fp16; None in other precisions."""
    first_scale: float
    """Loss scale before the first step; 1 without a scaler."""

    def step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
            self.schedule.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():  # torch warns if the first step is skipped
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()

    def has_stepped(self) -> bool:
        """Return False if the scaler has skipped all steps. Each skipped step reduces the scale."""
        if self.scaler is None:
            return True
        lowest = self.first_scale * self.scaler.get_backoff_factor() ** self.steps
        return self.scaler.get_scale() != float(np.float32(lowest))  # the scale is in float32


def _optimizer_groups(
    adapters: Adapters, states: Sequence[_TrainState], accelerator: Accelerator
) -> Iterator[_OptimizerGroup]:
    in_fp16 = accelerator.scaler is not None
    separate = in_fp16 or mixes_rows(states[0].training.optimizer)
    start = 0
    for _, group in groupby(states, key=_group_key):
        members = list(group)
        training, steps = members[0].training, members[0].steps
        size = 1 if separate else len(members)
        for first in range(start, start + len(members), size):
            rows = slice(first, first + size)
            parameter = torch.nn.Parameter(adapters.rows[rows])
            parameter.grad = adapters.gradient[rows]
            optimizer = make_optimizer(parameter, training, skips=in_fp16)
            schedule = make_schedule(optimizer, training, steps)
            scaler = new_scaler(accelerator)
            scale = 1.0 if scaler is None else scaler.get_scale()
            yield _OptimizerGroup(rows, steps, optimizer, schedule, scaler, scale)
        start += len(members)


class GradientRules:
    """Changes of the gradients: proximal terms, masks of trained columns, clipping."""

    def __init__(
        self,
        states: Sequence[_TrainState],
        phase: int,
        max_norm: float | None,
        device: torch.device,
    ) -> None:
        masks = [state.job.train.phases[phase] for state in states]
        self.columns: Tensor | None = None
        """Mask ``(K, P)`` of the columns that train; None if all columns train."""
        if any(mask is not None for mask in masks):
            all_columns = torch.ones_like(states[0].row, dtype=torch.bool)
            self.columns = torch.stack(
                [all_columns if mask is None else mask.to(device) for mask in masks]
            )
        self._proximal = [(k, state.proximal, state.anchor) for k, state in enumerate(states)]
        self._max_norm = max_norm

    def apply(self, adapters: Adapters) -> None:
        """Apply proximal terms, masks and clipping to the gradients, in place."""
        for k, proximal, anchor in self._proximal[: len(adapters)]:
            if anchor is not None:
                adapters.gradient[k].add_(adapters.rows[k] - anchor, alpha=2 * proximal)
        if self.columns is not None:
            adapters.gradient.mul_(self.columns[: len(adapters)])
        if self._max_norm is not None:
            norms = torch.linalg.vector_norm(adapters.gradient, dim=1, keepdim=True)
            scale = (self._max_norm / (norms + 1e-6)).clamp(max=1.0)  # as in clip_grad_norm_
            adapters.gradient.mul_(scale)

    def restore(self, adapters: Adapters, before: Tensor) -> None:
        """Restore the columns that do not train, because weight decay changes them, too.

        Args:
            adapters: The adapters after an optimizer step.
            before: Their rows before the step, ``(K, P)``.
        """
        if self.columns is not None:
            columns = self.columns[: len(adapters)]
            adapters.rows.copy_(torch.where(columns, adapters.rows, before))

"""Training several adapters in one forward pass: as one after another, in less time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache, through
from fedmerge_peft.training.reference import (
    Trained,
    accumulate,
    count_steps,
    make_optimizer,
    make_schedule,
    split,
    spread,
    steps,
)
from fedmerge_peft.util.seeds import derive, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

_FEWEST, _MOST = 3, 16
"""How many adapters ``auto`` puts into one pass; two save too little (3 % on a CPU) to draw their dropout masks together."""
_EXAMPLES = {"cpu": 8, "cuda": 256}
"""How many examples ``auto`` brings a pass to. On a CPU, a larger pass saves less than padding to its longest text costs."""


@dataclass(frozen=True)
class Job:
    """One adapter to train, on one client's examples."""

    train: Train
    indices: Indices
    """The client's rows of the table."""
    seed: int
    """Decides the order of examples, and takes part in deciding the dropout masks."""


@dataclass
class _Pupil:
    """A job on its way."""

    job: Job
    total: int
    """Optimizer steps in each phase."""
    row: Tensor
    """θ, ``(P,)`` on the device."""
    anchor: Tensor | None
    """``(P,)``; None where nothing pulls towards it."""
    proximal: float
    example_weights: Tensor | None
    """By row of the whole table, ``(n,)``."""
    losses: list[Tensor] = field(default_factory=list)


def train_together(
    backbone: Backbone,
    task: Task,
    training: TrainingRecipe,
    accelerator: Accelerator,
    jobs: Sequence[Job],
    examples: Examples,
    cache: PrefixCache | None = None,
) -> list[Trained]:
    """Train several adapters, each on its own examples; what ``reference.train`` gives for each, to rounding.

    A step takes the next step of each job: the same examples in the same order, each job's own mean loss, own clipping, own learning
    rate. The optimizers are elementwise, so that one over all rows is one for each. Jobs whose steps are done leave the batch.

    Dropout masks are drawn for the batch as a whole. They follow from the seeds of all jobs in it, so that the same jobs give the same
    numbers, but with other company a job has other masks.

    Args:
        backbone: A model to which ``stack.stacking_obstacle`` has no objection. Its slot is left alone.
        task: Gives batches and losses.
        training: Optimizer, schedule, batch size and the rest; a batch of the model has so many examples of each job.
        accelerator: Autocast; without a gradient scaler.
        jobs: What to train; at least one.
        examples: The encoded table.
        cache: Spares the layers before the first that trains.
    """
    device = backbone.device
    if cache is not None:
        with accelerator.autocast():
            cache.open()  # it tries the model with one adapter
    pupils = []
    for job in jobs:
        plan, row = job.train, job.train.row.to(device)
        proximal = training.proximal if plan.proximal is None else plan.proximal
        anchor = (row if plan.anchor is None else plan.anchor.to(device)) if proximal else None
        weights = spread(plan.example_weights, job.indices, len(examples))
        pupils.append(
            _Pupil(job, count_steps(len(job.indices), training), row, anchor, proximal, weights)
        )
    backbone.train()
    first, *others = (job.seed for job in jobs)
    with seeded(derive(first, "dropout", *others), device):
        for phase in range(max(len(job.train.phases) for job in jobs)):
            present = [pupil for pupil in pupils if phase < len(pupil.job.train.phases)]
            present.sort(key=lambda pupil: -pupil.total)
            _train_phase(backbone, task, training, accelerator, present, phase, examples, cache)
    backbone.eval()
    return [
        Trained(
            pupil.row.to("cpu", copy=True),
            float(torch.stack(pupil.losses).mean()),
            len(pupil.losses),
        )
        for pupil in pupils
    ]


def _train_phase(
    backbone: Backbone,
    task: Task,
    training: TrainingRecipe,
    accelerator: Accelerator,
    pupils: list[_Pupil],
    phase: int,
    examples: Examples,
    cache: PrefixCache | None,
) -> None:
    """One pass of local training for each; those with the most steps come first, so that those who are done are the last."""
    stack = AdapterStack(backbone, torch.stack([pupil.row for pupil in pupils]))
    orders = [steps(pupil.job.indices, training, pupil.job.seed, phase) for pupil in pupils]
    blocks = list(_blocks(stack, training, pupils))
    rules = _Rules(pupils, phase, training.max_grad_norm, backbone.device)
    with stack.applied():
        for done in range(pupils[0].total):
            while blocks[-1].total == done:
                leaving = blocks.pop()
                for pupil, row in zip(pupils[leaving.rows], stack.rows[leaving.rows], strict=True):
                    pupil.row = row.clone()
                stack.truncate(leaving.rows.start)
            here = pupils[: len(stack)]
            batches = [next(order) for order in orders[: len(stack)]]
            losses = accumulate_together(
                stack,
                task,
                accelerator,
                examples,
                batches,
                [each.example_weights for each in here],
                cache,
            )
            for pupil, loss in zip(here, losses, strict=True):
                pupil.losses.append(loss)
            rules.bend(stack)
            before = stack.rows.clone() if rules.columns is not None else None
            for block in blocks:
                block.optimizer.step()
                block.schedule.step()
            if before is not None:
                rules.restore(stack, before)
            stack.gradient.zero_()
    for pupil, row in zip(pupils, stack.rows, strict=False):
        pupil.row = row.clone()


@dataclass(frozen=True)
class _Block:
    """Rows of the stack with equally many steps: one optimizer, one learning rate."""

    rows: slice
    total: int
    optimizer: torch.optim.Optimizer
    schedule: Any


def _blocks(
    stack: AdapterStack, training: TrainingRecipe, pupils: Sequence[_Pupil]
) -> Iterator[_Block]:
    start = 0
    for total, group in groupby(pupils, key=lambda pupil: pupil.total):
        rows = slice(start, start + len(list(group)))
        parameter = torch.nn.Parameter(stack.rows[rows])
        parameter.grad = stack.gradient[rows]
        optimizer = make_optimizer(parameter, training)
        yield _Block(rows, total, optimizer, make_schedule(optimizer, training, total))
        start = rows.stop


class _Rules:
    """What bends gradients: proximal terms, columns that stay, the bound on each row's norm."""

    def __init__(
        self, pupils: Sequence[_Pupil], phase: int, max_norm: float | None, device: torch.device
    ) -> None:
        masks = [pupil.job.train.phases[phase] for pupil in pupils]
        self.columns: Tensor | None = None
        """What trains, a mask ``(K, P)``; None for everything."""
        if any(mask is not None for mask in masks):
            whole = torch.ones_like(pupils[0].row, dtype=torch.bool)
            self.columns = torch.stack(
                [whole if mask is None else mask.to(device) for mask in masks]
            )
        self._pulls = [
            (number, pupil.proximal, pupil.anchor) for number, pupil in enumerate(pupils)
        ]
        self._max_norm = max_norm

    def bend(self, stack: AdapterStack) -> None:
        """Make the gradients of the losses those to step by."""
        for number, proximal, anchor in self._pulls[: len(stack)]:
            if anchor is not None:
                stack.gradient[number].add_(stack.rows[number] - anchor, alpha=2 * proximal)
        if self.columns is not None:
            stack.gradient.mul_(self.columns[: len(stack)])
        if self._max_norm is not None:
            norms = torch.linalg.vector_norm(stack.gradient, dim=1, keepdim=True)
            stack.gradient.mul_(
                (self._max_norm / (norms + 1e-6)).clamp(max=1.0)
            )  # as torch's clip_grad_norm_

    def restore(self, stack: AdapterStack, before: Tensor) -> None:
        """Take back what weight decay did to columns that stay."""
        if self.columns is not None:
            stack.rows.copy_(torch.where(self.columns[: len(stack)], stack.rows, before))


def accumulate_together(
    stack: AdapterStack,
    task: Task,
    accelerator: Accelerator,
    examples: Examples,
    batches: Sequence[list[Indices]],
    example_weights: Sequence[Tensor | None],
    cache: PrefixCache | None = None,
) -> Tensor:
    """Add the gradient of each adapter's mean loss to ``stack.gradient``, and return these means ``(K,)``. Call it within ``applied``.

    Args:
        stack: K adapters.
        task: Gives batches and losses.
        accelerator: Autocast.
        examples: The encoded table.
        batches: The micro-batches of one step, for each adapter. Shorter ones are filled up with examples that do not count.
        example_weights: What each row of the table counts for each adapter; None for 1.
        cache: Spares the layers before the first that trains.
    """
    device = stack.rows.device
    passes = []
    counts = np.zeros(len(stack))
    for number in range(max(len(batch) for batch in batches)):
        parts = [batch[number] if number < len(batch) else batch[0][:0] for batch in batches]
        width = max(len(part) for part in parts)
        chunk = np.concatenate(
            [
                np.resize(part if len(part) else batch[0][:1], width)
                for part, batch in zip(parts, batches, strict=True)
            ]
        )
        batch = task.collate(examples, chunk)
        weights = torch.zeros(len(stack), width)
        for k, (part, each) in enumerate(zip(parts, example_weights, strict=True)):
            counts[k] += task.count_terms(batch["labels"][k * width : k * width + len(part)])
            weights[k, : len(part)] = 1.0 if each is None else each[torch.from_numpy(part)]
        passes.append((chunk, batch, weights))
    sums = torch.zeros(len(stack), device=device)
    divisors = torch.from_numpy(counts)[:, None]
    for chunk, batch, weights in passes:
        labels, inputs = split(batch, device)
        with accelerator.autocast(), through(cache, chunk):
            logits = stack.model(**inputs).logits
        each = task.losses(logits, labels)[0].view(len(stack), -1)
        means = (each * (weights / divisors).to(each)).sum(dim=1)
        stack.backward(means.sum())
        sums += means.detach()
    return sums


def clients_per_batch(
    backbone: Backbone,
    task: Task,
    training: TrainingRecipe,
    accelerator: Accelerator,
    examples: Examples,
    rows: Indices,
) -> int:
    """How many adapters to train in one pass: what the recipe says, or 1 where that would not be exact, with the reason in the log.

    What modules do not tell, a pass of two examples does: their gradients, together and alone, have to agree.

    Args:
        backbone: The model.
        task: Gives batches and losses.
        training: ``clients_per_batch`` and what else matters.
        accelerator: Autocast.
        examples: The encoded table.
        rows: The rows of it that clients hold.
    """
    wanted = training.clients_per_batch
    count = (
        min(_MOST, _EXAMPLES.get(backbone.device.type, 8) // training.batch_size)
        if wanted == "auto"
        else wanted
    )
    if count < (_FEWEST if wanted == "auto" else 2):
        return 1
    if accelerator.scaler is not None:
        reason: str | None = "fp16's loss scale would be common to all (training.mixed_precision)"
    else:
        reason = stacking_obstacle(backbone) or _disagreement(
            backbone, task, accelerator, examples, rows
        )
    if reason is not None:
        log.info("clients train one at a time: %s", reason)
        return 1
    return count


def _disagreement(
    backbone: Backbone, task: Task, accelerator: Accelerator, examples: Examples, rows: Indices
) -> str | None:
    """Compare gradients of two adapters on the shortest and the longest example, in one pass and in one each."""
    sizes = examples.lengths[rows]
    short, long = rows[[int(sizes.argmin())]], rows[[int(sizes.argmax())]]
    batches = [[short], [np.concatenate([long, short])]]
    backbone.eval()
    held = backbone.row()
    with torch.enable_grad(), seeded(0, backbone.device):
        noise = torch.randn(2, len(held)) * 0.02
        adapters = (held + noise.to(held)).to(backbone.device)  # neither factor is zero
        stack = AdapterStack(backbone, adapters)
        try:
            with stack.applied():
                accumulate_together(stack, task, accelerator, examples, batches, [None, None])
        except Exception as error:  # whatever a model stumbles over whose layers do not keep to (batch, ..., width)
            return f"the model does not run with several adapters ({type(error).__name__}: {error})"
        gradient = backbone.flat.grad
        assert gradient is not None  # noqa: S101 (the backbone keeps it for good)
        exact = accelerator.mixed_precision == "no" and backbone.model.dtype == torch.float32
        for adapter, batch, found in zip(adapters, batches, stack.gradient, strict=True):
            backbone.load_row(adapter)
            gradient.zero_()
            accumulate(backbone, task, accelerator, examples, batch)
            agree = bool((found - gradient).norm() <= (0.02 if exact else 0.1) * gradient.norm())
            gradient.zero_()
            if not agree:
                return "the model's layers mix the examples of a batch, or use an adapter in a way of their own"
        backbone.load_row(held)
    return None

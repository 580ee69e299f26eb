"""Scores of adapters and mixtures of adapters on a client's own examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.tasks.metrics import own_scores, score
from fedmerge_peft.tasks.predictions import Predictions
from fedmerge_peft.training.objective import Objective, training_losses
from fedmerge_peft.training.plan import Mixture, Served
from fedmerge_peft.training.runtime import Runtime


def evaluate(
    runtime: Runtime, served: Served, indices: Indices, batch_size: int
) -> dict[str, float]:
    """Return the mean loss and the task's metrics: ``{"loss": ..., "accuracy": ...}``.

    The loss is in nats; for regression, it is the squared error. The result also contains the
    metrics that ``task.compute_metrics`` returns.

    Args:
        runtime: Model, task and examples.
        served: An adapter ``(P,)`` or a mixture.
        indices: Rows of the table.
        batch_size: Examples in a pass.

    Raises:
        RecipeError: A metric needs generated text, but ``served`` is a mixture;
            ``compute_metrics`` did not return a mapping of new names to numbers; or an error of
            ``PrefixCache.prepare`` occurs.
    """
    return evaluate_parts(runtime, served, [indices], batch_size)[0]


@torch.no_grad()
def evaluate_parts(
    runtime: Runtime, served: Served, parts: Sequence[Indices], batch_size: int
) -> list[dict[str, float]]:
    """Return the scores (``evaluate``) of several sets of examples, such as validation and test.

    A batch may contain examples of several sets, so that a client with small sets needs fewer
    passes. The scores equal those of separate calls up to rounding, unless texts are sampled
    (``do_sample``).

    Args:
        runtime: Model, task and examples.
        served: An adapter ``(P,)`` or a mixture.
        parts: For each set, its rows of the table.
        batch_size: Examples in a pass.

    Raises:
        RecipeError: As in ``evaluate``.
    """
    task = runtime.task
    if not parts:
        return []
    if len(parts) > 1 and (task.in_batch or task.padding in ("none", "alone")):
        return [evaluate(runtime, served, part, batch_size) for part in parts]
    predictions = [Predictions() for _ in parts]
    rows, owners = _joined(runtime.examples, parts, batch_size)
    done = 0
    for chunk, logits, labels in _forward(runtime, served, rows, batch_size):
        bounds = np.searchsorted(owners[done : done + len(chunk)], np.arange(len(parts) + 1))
        done += len(chunk)
        for part, (start, stop) in zip(predictions, pairwise(bounds.tolist()), strict=True):
            if start < stop:
                _add(runtime, part, chunk[start:stop], logits, labels, slice(start, stop))
                if task.generates:
                    part.add({"texts": _generated(runtime, served, chunk[start:stop])})
    return [_scores(task, part) for part in predictions]


@torch.no_grad()
def evaluate_together(
    runtime: Runtime, rows: Tensor, parts: Sequence[Sequence[Indices]]
) -> list[list[dict[str, float]]]:
    """Return the scores (``evaluate_parts``) of several adapters from one pass of the model.

    All examples share the pass. If a metric needs generated text, they also share its generation.
    The scores equal those of separate passes up to rounding, unless texts are sampled
    (``do_sample``).

    Args:
        runtime: Model, task and examples; ``sharing_obstacle`` returns None.
        rows: K adapters, ``(K, P)``.
        parts: For each adapter, the rows of the table in each set. At least one set of each
            adapter has an example.

    Raises:
        RecipeError: As in ``evaluate``.
    """
    batch = _SharedPass(runtime, rows, [np.concatenate(own) for own in parts])
    with batch.applied():
        logits = batch.logits()
        texts = _generated(runtime, rows, batch.rows) if runtime.task.generates else None
    scores = []
    for number, own in enumerate(parts):
        start, scored = number * batch.width, []
        for part in own:
            predictions, place = Predictions(), slice(start, start := start + len(part))
            if len(part):
                _add(runtime, predictions, part, logits, batch.labels, place)
            if texts is not None and len(part):
                predictions.add({"texts": (texts[0][place], texts[1][place])})
            scored.append(_scores(runtime.task, predictions))
        scores.append(scored)
    return scores


class _SharedPass:
    """One pass of several adapters, each on its own examples.

    Adapters with fewer examples than others repeat them, since all adapters get equal parts of the
    batch (``AdapterStack``).

    Args:
        runtime: Model, task and examples.
        adapters: K adapters, ``(K, P)``.
        indices: Each adapter's rows of the table, at least one.
    """

    def __init__(self, runtime: Runtime, adapters: Tensor, indices: Sequence[Indices]) -> None:
        self._runtime = runtime
        self._stack = AdapterStack(runtime.backbone, adapters.to(runtime.device))
        self.width = max(map(len, indices))
        """Number of examples of each adapter, including repeated ones."""
        self.rows = np.concatenate([np.resize(own, self.width) for own in indices])
        """Rows of the table in the batch."""
        self.labels, self._inputs = runtime.to_device(runtime.collate(self.rows))
        if runtime.cache is not None:  # the cache's own passes need the plain model
            with runtime.accelerator.autocast():
                runtime.cache.prepare(self.rows)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the adapters, without dropout, to the passes inside the context."""
        self._runtime.backbone.eval()
        with self._stack.applied():
            yield

    def logits(self) -> Tensor:
        """Run the model and return ``Runtime.logits`` of the batch."""
        return self._runtime.logits(
            self._stack.model, self.rows, self._inputs, self.labels, len(self._stack)
        )


def _scores(task: Task, predictions: Predictions) -> dict[str, float]:
    scores = score(task.metrics, predictions)
    if task.compute_metrics is not None and predictions.outputs:
        scores |= own_scores(task.compute_metrics, task.metrics, predictions)
    return scores


def _joined(
    examples: Examples, parts: Sequence[Indices], batch_size: int
) -> tuple[Indices, Indices]:
    """Return the rows of all parts, ordered for batches of similar lengths, and each row's part.

    Within a batch, the rows are sorted by their part.
    """
    rows = np.concatenate(list(parts))
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = _by_length(examples, rows)
    batch = np.arange(len(rows)) // batch_size
    order = order[np.lexsort((owners[order], batch))]
    return rows[order], owners[order]


def _of_examples(runtime: Runtime, logits: Tensor, labels: Tensor, start: int, stop: int) -> Tensor:
    """Return the logits of consecutive examples of a batch, as a view."""
    targets = None if runtime.head is None else runtime.task.token_targets(labels)
    if targets is None:
        per_example = len(logits) // len(labels)  # rows of logits
        return logits[start * per_example : stop * per_example]
    ends = np.cumsum([0, *(targets != -100).view(len(labels), -1).sum(dim=1).tolist()])
    return logits[ends[start] : ends[stop]]


def _add(
    runtime: Runtime,
    predictions: Predictions,
    rows: Indices,
    logits: Tensor,
    labels: Tensor,
    place: slice,
) -> None:
    """Add the losses and outputs of consecutive examples of a batch to predictions.

    Args:
        runtime: Model, task and examples.
        predictions: Predictions to which losses and outputs are added.
        rows: The examples' rows of the table.
        logits: Logits of the whole batch.
        labels: Labels of the whole batch.
        place: Place of the examples in the batch.
    """
    own = _of_examples(runtime, logits, labels, place.start, place.stop)
    sums, counts = runtime.task.losses(own, labels[place])
    predictions.loss_sum += float(sums.double().sum())
    predictions.count += float(counts.sum())
    predictions.add(runtime.task.outputs(own, labels[place], runtime.examples, rows))


def _generated(runtime: Runtime, served: Served, rows: Indices) -> tuple[list[str], list[str]]:
    """Return the texts that the model generates for examples, and their references."""
    if isinstance(served, Mixture):
        raise RecipeError(
            "task.metrics: a mixture of models cannot generate text; use perplexity or accuracy"
        )
    with runtime.accelerator.autocast():
        return runtime.task.generate(runtime.backbone.model, runtime.examples, rows, runtime.device)


@torch.no_grad()
def example_losses(
    runtime: Runtime,
    row: Tensor,
    indices: Indices,
    batch_size: int,
    objective: Objective | None = None,
) -> Tensor:
    """Return each example's summed loss (nats) with an adapter, in the order of the indices.

    Args:
        runtime: Model, task and examples.
        row: Adapter, ``(P,)``.
        indices: Rows of the table.
        batch_size: Examples in a pass.
        objective: Training loss of the client; None for the task's loss.

    Returns:
        Losses, ``(n,)`` float32 on the CPU.

    Raises:
        RecipeError: As in ``PrefixCache.prepare``.
    """
    order = _by_length(runtime.examples, indices)
    batches = _forward(runtime, row, indices[order], batch_size)

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        if objective is None:
            return runtime.task.losses(logits, labels)[0]
        return training_losses(runtime.task, logits, labels, [objective])[0]

    values = torch.cat([losses(logits, labels).cpu() for _, logits, labels in batches])
    return values[torch.from_numpy(np.argsort(order))]


@torch.no_grad()
def losses_together(runtime: Runtime, rows: Tensor, indices: Sequence[Indices]) -> list[Tensor]:
    """Return ``example_losses`` of several adapters from one pass of the model.

    Args:
        runtime: Model, task and examples; ``sharing_obstacle`` returns None.
        rows: K adapters, ``(K, P)``.
        indices: Each adapter's rows of the table, at least one.

    Returns:
        For each adapter, losses ``(n,)`` float32 on the CPU.

    Raises:
        RecipeError: As in ``PrefixCache.prepare``.
    """
    batch = _SharedPass(runtime, rows, indices)
    with batch.applied():
        losses = runtime.task.losses(batch.logits(), batch.labels)[0].cpu()
    return [losses[number * batch.width :][: len(own)] for number, own in enumerate(indices)]


@torch.no_grad()
def confusion(
    runtime: Runtime, served: Served, indices: Indices, batch_size: int
) -> list[list[int]]:
    """Count labeled examples, or labeled tokens, by true and predicted class.

    Args:
        runtime: Model, examples, and a task with ``names_classes``.
        served: An adapter ``(P,)`` or a mixture.
        indices: Rows of the table.
        batch_size: Examples in a pass.

    Returns:
        ``[true class, predicted class, count]`` for each pair that occurs, in ascending order.

    Raises:
        RecipeError: As in ``PrefixCache.prepare``.
    """
    rows = indices[_by_length(runtime.examples, indices)]
    pairs = []
    for _, logits, labels in _forward(runtime, served, rows, batch_size):
        own = labels >= 0
        pairs.append(torch.stack([labels[own], logits.argmax(dim=-1)[own]], dim=1).cpu())
    cells, counts = np.unique(torch.cat(pairs).numpy(), axis=0, return_counts=True)
    return [[*pair, count] for pair, count in zip(cells.tolist(), counts.tolist(), strict=True)]


def _by_length(examples: Examples, indices: Indices) -> Indices:
    """Return an order of the examples in which batches need little padding.

    The longest come first, so that a batch that does not fit into memory fails at once.
    """
    return np.argsort(-examples.lengths[indices], kind="stable")


def _forward(
    runtime: Runtime, served: Served, indices: Indices, batch_size: int
) -> Iterator[tuple[Indices, Tensor, Tensor]]:
    """Yield rows, logits and labels of each batch; ``Task.mix`` combines a mixture's logits."""
    backbone = runtime.backbone
    backbone.eval()
    rows = (served.rows if isinstance(served, Mixture) else served[None]).to(backbone.device)
    for chunk in runtime.batches(indices, batch_size):
        labels, inputs = runtime.to_device(runtime.collate(chunk))
        logits = []
        for row in rows:
            backbone.load_row(row)
            # Autocast is entered for each row, because it caches weights.
            logits.append(runtime.logits(backbone.model, chunk, inputs, labels))
        if isinstance(served, Mixture):
            yield chunk, runtime.task.mix(logits, served.weights), labels
        else:
            yield chunk, logits[0], labels

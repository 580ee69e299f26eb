"""Runtime of training and evaluation: the loaded model, task and examples of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.models.first_token import FirstToken
from fedmerge_peft.models.labeled_head import LabeledHead
from fedmerge_peft.models.packing import Packing
from fedmerge_peft.recipe.schema import Logits
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.tasks.passes import split_batch
from fedmerge_peft.training.label_logits import client_offset
from fedmerge_peft.training.objective import Objective
from fedmerge_peft.training.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from accelerate import Accelerator

_SMALL = 6e7
"""Limit in floating-point operations. A matrix product with fewer operations is faster on one CPU
thread than on two.

Measured with the layers of MiniLM on two cores. If the second thread sleeps between products, two
threads are slower than one at 4e7 operations, and faster at 7e7. If other processes use the cores,
two threads are slower at both sizes.
"""


@dataclass(frozen=True)
class SharingTrial:
    """Outcome of ``batching.sharing_obstacle``."""

    obstacle: str | None


@dataclass
class Runtime:
    """One frozen model and the examples of all clients. All rounds share them."""

    backbone: Backbone
    task: Task
    accelerator: Accelerator
    """Device and autocast. The precision is fp16 if the accelerator has a gradient scaler."""
    examples: Examples
    """The encoded table."""
    cache: PrefixCache | None = None
    """Cache that skips the layers before the first trainable one; None if the run has no cache."""
    first_token: FirstToken | None = None
    """Cut of the last layer to the first token; None if the layer computes all tokens."""
    head: LabeledHead | None = None
    """Output layer of a decoder at labeled positions only; None if logits are computed at all
    positions."""
    packed: bool = False
    """True if several examples share a row of a batch (``Packing``); ``packing_trial.py`` checks
    that the model supports it."""
    sharing_trial: SharingTrial | None = None
    """Outcome of the trial of several adapters in one pass; None before the trial."""

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.backbone.device

    def collate(self, rows: Indices) -> Batch:
        """Stack and pad these examples, on the CPU."""
        return self.task.collate(self.examples, rows)

    def parts(self, rows: Indices) -> list[Indices]:
        """Split a batch into parts. The examples of a part may share a pass (``task.padding``)."""
        return split_batch(self.task.padding, self.examples, rows)

    def batches(self, rows: Indices, batch_size: int) -> list[Indices]:
        """Split rows into batches of at most ``batch_size``, each for one pass."""
        starts = range(0, len(rows), batch_size)
        return [part for start in starts for part in self.parts(rows[start : start + batch_size])]

    def to_device(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a batch's labels and the model's inputs, on the device.

        The labels are not inputs of the model, because its own loss would average over clients.
        """
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return inputs.pop("labels"), inputs

    def objective(self, logits: Logits, rows: Indices) -> Objective:
        """Return the training loss of a client with these training examples.

        For the arguments and errors, see ``label_logits.client_offset``.
        """
        offset = client_offset(logits, self.examples, rows, len(self.task.labels))
        weights = self.task.class_weights(self.examples, rows)
        return Objective(None if offset is None else offset.to(self.device), weights)

    @cached_property
    def _product_size(self) -> float:
        """Floating-point operations to multiply one example by a frozen matrix.

        The example has the mean length, and the matrix the median size.
        """
        frozen = [
            weight.numel()
            for weight in self.backbone.model.parameters()
            if weight.ndim == 2 and not weight.requires_grad
        ]
        return float(2 * median(frozen or [0]) * self.examples.lengths.mean())

    @contextmanager
    def cpu_threads(self, examples: int) -> Iterator[None]:
        """Use one CPU thread inside the context if passes on this many examples are small.

        The rule depends on the model and the examples alone, so that the number of cores does not
        change the rounding of small models. It does not apply if ``OMP_NUM_THREADS`` is set.
        """
        usual = torch.get_num_threads()
        small = 0 < examples * self._product_size < _SMALL
        if self.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or not small:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(usual)

    @contextmanager
    def forward_pass(self, rows: Indices, packing: Packing | None = None) -> Iterator[None]:
        """Apply autocast, the prefix cache and the cut to the first token inside the context.

        Run exactly one forward pass on these examples inside the context.

        Args:
            rows: Rows of the table.
            packing: Mapping of the batch to packed rows; None for a padded batch.

        Raises:
            RecipeError: As in ``PrefixCache.prepare``.
        """
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if self.cache is not None:
                stack.enter_context(self.cache.batch_context(rows, packing))
            if self.first_token is not None:
                stack.enter_context(self.first_token.applied())
            yield

    def backward(self, loss: Tensor, scaler: GradScaler | None) -> None:
        """Run Accelerate's backward pass.

        Args:
            loss: Loss of one adapter, a scalar.
            scaler: The adapter's gradient scaler in fp16; None in other precisions.
        """
        usual, self.accelerator.scaler = self.accelerator.scaler, scaler
        try:
            self.accelerator.backward(loss)
        finally:
            self.accelerator.scaler = usual

    def logits(
        self,
        model: Any,
        rows: Indices,
        inputs: dict[str, Any],
        labels: Tensor,
        adapters: int = 1,
        *,
        for_losses: bool = False,
    ) -> Tensor:
        """Run the model on examples and return their logits.

        Args:
            model: The backbone's model, to which the adapters are applied.
            rows: Rows of the table.
            inputs: Their inputs on the device.
            labels: Their labels on the device.
            adapters: K, the number of adapters, each of which gets an equal part of the rows.
            for_losses: True if only ``Task.losses`` reads the result.

        Returns:
            Output of ``Task.forward``. With ``head``, the logits at labeled positions,
            ``(positions, vocabulary)``. With ``head`` and ``for_losses``, if
            ``LabeledHead.in_chunks`` is True for these positions, their cross-entropies,
            ``(positions,)``.

        Raises:
            RecipeError: As in ``PrefixCache.prepare``.
        """
        targets = None if self.head is None else self.task.token_targets(labels)
        packing = None
        if self.packed:
            packing = Packing(inputs["attention_mask"], adapters)
            inputs = {
                "input_ids": packing.pack(inputs["input_ids"]),
                "position_ids": packing.positions,
                "use_cache": False,  # with a cache, transformers derives no mask from positions
            }
        with self.forward_pass(rows, packing):
            if self.head is None or targets is None:
                logits = self.task.forward(model, inputs)
                return logits if packing is None else packing.unpack(logits)
            inside = targets != -100
            tokens = targets[inside]
            labeled = inside if packing is None else packing.pack(inside)
            in_chunks = for_losses and self.head.in_chunks(len(tokens))
            if in_chunks:
                with self.head.set_aside(labeled) as kept:
                    self.task.forward(model, inputs)
                (values,) = kept
            else:
                with self.head.applied(labeled):
                    values = self.task.forward(model, inputs)[0]
            if packing is not None:
                values = packing.in_order(values, labeled)
            return self.head.losses(values, tokens) if in_chunks else values

"""Cache of the hidden states that enter the first trainable layer, computed once per example."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.models.frozen_prefix import Prefix
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.util.seeds import seeded

if TYPE_CHECKING:
    from fedmerge_peft.data.clients import Indices

log = logging.getLogger(__name__)


class PrefixCache:
    """Cache of the hidden states that enter layer l, the first trainable layer.

    The cache covers the clients' examples. It stores an example's states on the example's first
    forward pass. Later passes skip the layers before l.

    A trial batch of the shortest and the longest example first checks whether the model supports
    the cache. If it does not, or if the states would exceed the memory limit, every batch runs all
    layers.

    Batches must be padded on the right to their longest example, or hold one length. Otherwise, the
    trial disables the cache.

    Args:
        backbone: Model whose ``prefix`` is not None.
        task: Task that collates batches and computes losses.
        examples: Encoded table.
        rows: Rows of the table that belong to clients.
        gigabytes: Largest size of the stored states, on the model's device.
    """

    def __init__(
        self, backbone: Backbone, task: Task, examples: Examples, rows: Indices, gigabytes: float
    ) -> None:
        self._backbone = backbone
        self._task = task
        self._examples = examples
        self._client_rows = rows
        self._max_gigabytes = gigabytes
        self._prepared = False
        self._store: Tensor | None = None
        """States of all examples one after another, ``(1 + positions, width)``; row 0 is zero and
        stands for padding."""
        self._lengths = np.zeros(len(examples), dtype=np.int64)
        self._starts = np.zeros(len(examples), dtype=np.int64)
        """First row of each example in the store; 0 for examples of no client."""
        self._stored = np.zeros(len(examples), dtype=bool)

    def batch_context(self, rows: Indices) -> AbstractContextManager[None]:
        """Return a context in which a forward pass on the batch of these rows uses the cache.

        Enter it under the autocast of the pass.
        """
        self.prepare()
        prefix = self._backbone.prefix
        if prefix is None or self._store is None or not (self._starts[rows] > 0).all():
            return nullcontext()
        if self._stored[rows].all():
            return prefix.replay(self._read(self._store, rows))
        return self._recording(prefix, self._store, rows)

    def prepare(self) -> None:
        """On the first call, check whether the model supports the cache, and allocate the store.

        Call it under the autocast of the passes.
        """
        if self._prepared:
            return
        self._prepared = True
        prefix = self._backbone.prefix
        if prefix is None:
            reason: str | None = "no layers precede the first trainable layer"
        else:
            reason = self._try_model(prefix)
        if reason is not None:
            self._store = None
            log.info("the prefix cache is disabled; every pass runs all layers: %s", reason)

    def _try_model(self, prefix: Prefix) -> str | None:
        """Try the cache on two examples and allocate the store for all.

        Returns:
            The reason why the cache cannot be used, or None.
        """
        sizes = self._examples.lengths[self._client_rows]
        trial = [int(sizes.argmin()), int(sizes.argmax())]
        rows = self._client_rows[trial[1:] if self._task.padding in ("none", "alone") else trial]
        inputs = {
            name: tensor.to(self._backbone.device)
            for name, tensor in self._task.collate(self._examples, rows).items()
        }
        labels = inputs.pop("labels")
        if "decoder_input_ids" in inputs:
            return "the decoder has positions of its own"
        with self._trial():
            losses, entering = self._run(prefix, inputs, labels)
            self._backbone.train()
            _, in_training = self._run(prefix, inputs, labels)
            self._backbone.eval()
            if len(entering) != 1 or entering[0].ndim != 3:
                return "the first trainable layer's input is not one tensor (batch, length, width)"
            states = entering[0]
            if states.requires_grad:
                return "trainable parameters precede the frozen layers"
            if not torch.equal(states, in_training[0]):
                return "the frozen layers have dropout that cannot be disabled"
            if not self._lay_out(inputs, rows, states):
                return "the model's positions are not the batch's tokens"
            positions = 1 + int(self._lengths[self._client_rows].sum())
            needed = positions * states.shape[2] * states.element_size() / 1e9
            if needed > self._max_gigabytes:
                log.warning(
                    "the frozen layers' states need %.2g GB, "
                    "but training.prefix_cache allows %.2g GB; raise it for faster training",
                    needed,
                    self._max_gigabytes,
                )
                return "training.prefix_cache is too small"
            self._store = states.new_zeros(positions, states.shape[2])
            with self._recording(prefix, self._store, rows):
                self._task.forward(self._backbone.model, inputs)
            try:
                with prefix.replay(self._read(self._store, rows)):
                    replayed = self._losses(inputs, labels)
            except (
                Exception
            ) as error:  # models that depend on their first layers raise arbitrary errors
                return (
                    "the model does not run without its first layers "
                    f"({type(error).__name__}: {error})"
                )
            if not torch.allclose(replayed, losses, rtol=1e-3, atol=1e-3):
                return "the later layers need more than the output of the first layers"
        log.info("the frozen layers' states need up to %.2g GB", needed)
        return None

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Enable evaluation mode with gradients; restore the model's mode and generators
        afterwards.

        Gradients reveal whether the states depend on trainable tensors.
        """
        training = self._backbone.model.training
        self._backbone.eval()
        try:
            with torch.enable_grad(), seeded(0, self._backbone.device):
                yield
        finally:
            if training:
                self._backbone.train()
            else:
                self._backbone.eval()

    def _run(self, prefix: Prefix, inputs: Batch, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run all layers; return the losses ``(batch,)`` and the states that entered layer l."""
        entering: list[Tensor] = []
        with prefix.record(entering.append):
            return self._losses(inputs, labels), entering

    def _losses(self, inputs: Batch, labels: Tensor) -> Tensor:
        return self._task.losses(self._task.forward(self._backbone.model, inputs), labels)[
            0
        ].detach()

    def _lay_out(self, inputs: Batch, rows: Indices, states: Tensor) -> bool:
        """Assign rows of the store to each example.

        Returns:
            False if the positions of the batch are not its tokens, padded on the right.
        """
        mask = inputs.get("attention_mask")
        if mask is None:
            self._lengths[self._client_rows] = states.shape[1]
        else:
            self._lengths[self._client_rows] = self._examples.lengths[self._client_rows]
        self._starts[self._client_rows] = (
            1 + np.cumsum(self._lengths[self._client_rows]) - self._lengths[self._client_rows]
        )
        inside = self._store_rows(rows) > 0
        return states.shape[:2] == inside.shape and (
            mask is None or torch.equal(mask.bool(), inside)
        )

    def _store_rows(self, rows: Indices) -> Tensor:
        """Return the store's row of each position, ``(batch, length)`` int64; 0 for padding."""
        lengths = self._lengths[rows][:, None]
        positions = np.arange(lengths.max())
        store_rows = np.where(positions < lengths, self._starts[rows][:, None] + positions, 0)
        return torch.from_numpy(store_rows).to(self._backbone.device, non_blocking=True)

    def _read(self, store: Tensor, rows: Indices) -> Tensor:
        """Return the states of a batch, ``(batch, length, width)``; zeros for padding."""
        store_rows = self._store_rows(rows)
        return store.index_select(0, store_rows.flatten()).view(*store_rows.shape, -1)

    def _recording(
        self, prefix: Prefix, store: Tensor, rows: Indices
    ) -> AbstractContextManager[None]:
        """Return a context in which the model runs all layers and the states are stored."""

        def record(states: Tensor) -> None:
            store_rows = self._store_rows(rows)
            repeated = np.ones(len(rows), dtype=bool)
            repeated[np.unique(rows, return_index=True)[1]] = False
            store_rows[torch.from_numpy(repeated)] = 0  # store a repeated example once
            inside = store_rows > 0
            store[store_rows[inside]] = states.detach()[inside]
            self._stored[rows] = True

        return prefix.record(record)

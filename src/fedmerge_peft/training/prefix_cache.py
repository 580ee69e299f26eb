"""What enters the first layer that trains, computed once for each example."""

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
    """The hidden states that enter layer l, the first that trains, for the examples that clients hold.

    An example's states are kept when it first passes through the model, and from then on the layers before l are left out.
    Before the first batch, a batch of the shortest and the longest example shows whether the model allows that; where it does not, or
    where the states would take too much memory, every batch takes the way through all layers.

    Batches are padded on the right to their longest example, as all tasks do.

    Args:
        backbone: The model, whose ``prefix`` is not None.
        task: Gives batches and losses.
        examples: The encoded table.
        rows: The rows of it that clients hold.
        gigabytes: The most memory to take, on the model's device.
    """

    def __init__(
        self, backbone: Backbone, task: Task, examples: Examples, rows: Indices, gigabytes: float
    ) -> None:
        self._backbone = backbone
        self._task = task
        self._examples = examples
        self._rows = rows
        self._limit = gigabytes
        self._opened = False
        self._store: Tensor | None = None
        """``(1 + positions, width)``: the states of one example after another; first comes a row of zeros, for padding."""
        self._lengths = np.zeros(len(examples), dtype=np.int64)
        self._starts = np.zeros(len(examples), dtype=np.int64)
        """Each example's first row in the store; 0 for those that nobody holds."""
        self._known = np.zeros(len(examples), dtype=bool)

    def through(self, chunk: Indices) -> AbstractContextManager[None]:
        """Within, the model runs on the batch of these rows, and leaves out what is known. Enter it under the pass's own autocast."""
        self.open()
        prefix = self._backbone.prefix
        if prefix is None or self._store is None or not (self._starts[chunk] > 0).all():
            return nullcontext()
        if self._known[chunk].all():
            return prefix.replay(self._read(self._store, chunk))
        return self._keeping(prefix, self._store, chunk)

    def open(self) -> None:
        """Find out whether the model allows the cache, unless that is known. As ``through``, under the pass's own autocast."""
        if self._opened:
            return
        self._opened = True
        prefix = self._backbone.prefix
        reason = "no layers precede the first that trains" if prefix is None else self._open(prefix)
        if reason is not None:
            self._store = None
            log.info("every pass runs all layers: %s", reason)

    def _open(self, prefix: Prefix) -> str | None:
        """Try the cache on two examples, and make room for all. Returns the reason why the cache cannot be used, if there is one."""
        sizes = self._examples.lengths[self._rows]
        chunk = self._rows[[int(sizes.argmin()), int(sizes.argmax())]]
        inputs = {
            name: tensor.to(self._backbone.device)
            for name, tensor in self._task.collate(self._examples, chunk).items()
        }
        labels = inputs.pop("labels")
        with self._trial():
            losses, entering = self._run(prefix, inputs, labels)
            self._backbone.train()
            _, in_training = self._run(prefix, inputs, labels)
            self._backbone.eval()
            if len(entering) != 1 or entering[0].ndim != 3:
                return "the first layer that trains does not get one tensor (batch, length, width)"
            states = entering[0]
            if states.requires_grad:
                return "something that trains comes before the layers"
            if not torch.equal(states, in_training[0]):
                return "the frozen layers have dropout that cannot be turned off"
            if not self._lay_out(inputs, chunk, states):
                return "positions and tokens differ"
            positions = 1 + int(self._lengths[self._rows].sum())
            needed = positions * states.shape[2] * states.element_size() / 1e9
            if needed > self._limit:
                log.warning(
                    "the frozen layers' states would take %.2g GB; training.prefix_cache allows %.2g",
                    needed,
                    self._limit,
                )
                return "training.prefix_cache is too small"
            self._store = states.new_zeros(positions, states.shape[2])
            with self._keeping(prefix, self._store, chunk):
                self._backbone.model(**inputs)
            try:
                with prefix.replay(self._read(self._store, chunk)):
                    again = self._losses(inputs, labels)
            except Exception as error:  # whatever a model that needs its first layers stumbles over
                return f"the model does not run without its first layers ({type(error).__name__}: {error})"
            if not torch.allclose(again, losses, rtol=1e-3, atol=1e-3):
                return (
                    "the model's later layers need more of its first layers than what they return"
                )
        log.info("the frozen layers' states take up to %.2g GB", needed)
        return None

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Passes of the model that leave its mode and torch's generators as they were, and show what depends on trainable tensors."""
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
        """The losses ``(batch,)`` by all layers, and what entered layer l."""
        entering: list[Tensor] = []
        with prefix.record(entering.append):
            return self._losses(inputs, labels), entering

    def _losses(self, inputs: Batch, labels: Tensor) -> Tensor:
        return self._task.losses(self._backbone.model(**inputs).logits, labels)[0].detach()

    def _lay_out(self, inputs: Batch, chunk: Indices, states: Tensor) -> bool:
        """Give each example its place in the store; False where a batch's positions are not its tokens, padded on the right."""
        mask = inputs.get("attention_mask")
        if mask is None:
            self._lengths[self._rows] = states.shape[1]
        else:
            self._lengths[self._rows] = self._examples.lengths[self._rows]
        self._starts[self._rows] = (
            1 + np.cumsum(self._lengths[self._rows]) - self._lengths[self._rows]
        )
        inside = self._places(chunk) > 0
        return states.shape[:2] == inside.shape and (
            mask is None or torch.equal(mask.bool(), inside)
        )

    def _places(self, chunk: Indices) -> Tensor:
        """The row in the store of each position of a batch, int64 ``(batch, length)``; 0 where the batch is padded."""
        lengths = self._lengths[chunk][:, None]
        positions = np.arange(lengths.max())
        places = np.where(positions < lengths, self._starts[chunk][:, None] + positions, 0)
        return torch.from_numpy(places).to(self._backbone.device, non_blocking=True)

    def _read(self, store: Tensor, chunk: Indices) -> Tensor:
        """The states of a batch, ``(batch, length, width)``; zeros where it is padded."""
        places = self._places(chunk)
        return store.index_select(0, places.flatten()).view(*places.shape, -1)

    def _keeping(
        self, prefix: Prefix, store: Tensor, chunk: Indices
    ) -> AbstractContextManager[None]:
        """Within, the model runs all layers, and the states are kept."""

        def keep(states: Tensor) -> None:
            places = self._places(chunk)
            again = np.ones(len(chunk), dtype=bool)
            again[np.unique(chunk, return_index=True)[1]] = False
            places[torch.from_numpy(again)] = (
                0  # of an example that is there twice, the first counts
            )
            inside = places > 0
            store[places[inside]] = states.detach()[inside]
            self._known[chunk] = True

        return prefix.record(keep)

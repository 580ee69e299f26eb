"""Cache of the hidden states that enter the first trainable layer, computed once per example."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.models.frozen_prefix import Prefix, prefix_identity
from fedmerge_peft.models.packing import Packing
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.tasks.passes import split_batch
from fedmerge_peft.training.prefix_disk import computation, disk_cache
from fedmerge_peft.util.digest import digest
from fedmerge_peft.util.seeds import seeded
from fedmerge_peft.util.tensor_cache import TensorCache

if TYPE_CHECKING:
    from fedmerge_peft.data.clients import Indices
    from fedmerge_peft.recipe import Recipe

log = logging.getLogger(__name__)

_POSITIONS = 4096
"""Largest number of positions in a pass that computes states, unless one example has more."""


def prefix_cache(
    recipe: Recipe,
    backbone: Backbone,
    task: Task,
    examples: Examples,
    groups: Sequence[Indices],
) -> PrefixCache | None:
    """Return the prefix cache of a run, or None if the run has no prefix cache.

    It is None if the model has no prefix (``find_prefix``), or if ``training.prefix_cache`` is 0.
    The arguments except ``recipe`` are those of ``PrefixCache``.

    Raises:
        RecipeError: The environment variable ``FEDMERGE_PREFIX_DISK`` is invalid.
    """
    training = recipe.training
    if training.prefix_cache == 0 or backbone.prefix is None:
        if training.prefix_dtype is not None:
            log.warning(
                "training.prefix_dtype has no effect, because %s, or remove training.prefix_dtype",
                "training.prefix_cache is 0; raise it"
                if training.prefix_cache == 0
                else "no layers are known to precede the first trainable one; list only upper "
                "layers in lora.layers_to_transform",
            )
        return None
    dtype = None if training.prefix_dtype is None else getattr(torch, training.prefix_dtype)
    disk = disk_cache(recipe)
    return PrefixCache(backbone, task, examples, groups, training.prefix_cache, disk, dtype)


class PrefixCache:
    """Cache of the hidden states that enter layer l, the first trainable layer.

    The cache covers the clients' examples. Passes on them skip the layers before l. Each group of
    examples is divided into parts of similar lengths. The states of a part are computed in one
    pass, before any other pass on an example of the part. The bits of the states therefore depend
    only on the groups, not on later passes, and are the same on the disk and in memory.

    A trial batch of the shortest and the longest example first checks whether the model supports
    the cache. If batches are not padded, the trial uses the longest example only. If the model does
    not support the cache, or if the states would exceed the memory limit, every batch runs all
    layers.

    Batches must be padded on the right to their longest example, or contain examples of one length.
    Otherwise, the trial disables the cache.

    Args:
        backbone: Model whose ``prefix`` is not None.
        task: Task that collates batches and computes losses.
        examples: Encoded table.
        groups: Rows of the table in groups. Each group has one client's examples for one purpose,
            for example training.
        gigabytes: Largest size of the states in memory, in GB (10⁹ bytes), on the model's device.
        disk: Cache of states on the disk, which runs share; None to keep states in memory only.
        dtype: Number format in which states are stored; None for the model's.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        examples: Examples,
        groups: Sequence[Indices],
        gigabytes: float,
        disk: TensorCache | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._backbone = backbone
        self._task = task
        self._examples = examples
        self._groups = groups
        self._max_gigabytes = gigabytes
        self._disk = disk
        self._stored_dtype = dtype
        self._tried = False
        self.used = False
        """True if the trial has run, the model supports the cache, and the states fit into memory.
        """
        self._lengths = np.zeros(len(examples), dtype=np.int64)
        """Number of positions of each example, summed over its sequences."""
        self._parts: list[Indices] = []
        """Rows of each part. The states of a part are computed in one pass."""
        self._states: dict[int, Tensor] = {}
        """States of each part that was needed so far, ``(positions, width)``. The examples of the
        part are concatenated."""
        self._part_of = np.full(len(examples), -1)
        """Index of each example's part; -1 for examples that belong to no group."""
        self._starts = np.zeros(len(examples), dtype=np.int64)
        """First position of each example in the states of its part."""

    @property
    def nbytes(self) -> int:
        """Bytes of the states in memory."""
        return sum(states.nbytes for states in self._states.values())

    def batch_context(
        self, rows: Indices, packing: Packing | None = None
    ) -> AbstractContextManager[None]:
        """Return a context in which a forward pass on the batch of these rows uses the cache.

        The context has no effect if the trial has disabled the cache, or if one of the rows belongs
        to no group. Call this method and enter the context under the autocast of the pass.

        Args:
            rows: Rows of the table.
            packing: Mapping of the batch to packed rows; None for a padded batch.

        Raises:
            RecipeError: As in ``prepare``.
        """
        self.prepare(rows)
        prefix = self._backbone.prefix
        if prefix is None or not self.used or (self._part_of[rows] < 0).any():
            return nullcontext()
        states = self._read(rows)
        return prefix.replay(states if packing is None else packing.pack(states))

    def prepare(self, rows: Indices) -> None:
        """Provide the states of these examples; the first call runs the trial.

        Call it under the autocast of the passes, and before several adapters share a pass:
        computing states needs the model with a single adapter.

        Raises:
            RecipeError: A state exceeds the range of ``training.prefix_dtype``.
        """
        prefix = self._backbone.prefix
        if not self._tried:
            self._tried = True
            if prefix is None:
                reason: str | None = "no layers are known to precede the first trainable one"
            else:
                reason = self._try_model(prefix)
            self.used = reason is None
            if reason is not None:
                log.info("the prefix cache is disabled; every pass runs all layers: %s", reason)
        if prefix is None or not self.used:
            return
        for part in np.unique(self._part_of[rows]).tolist():
            if part >= 0 and part not in self._states:
                self._states[part] = self._load_or_compute(prefix, self._parts[part])

    # ---- the states of one part ------------------------------------------------------------------

    def _load_or_compute(self, prefix: Prefix, rows: Indices) -> Tensor:
        """Return the concatenated states of these examples, ``(positions, width)``."""
        inputs = self._task.collate(self._examples, rows)
        del inputs["labels"]
        if self._disk is None:
            return self._compute(prefix, inputs, rows)
        key = self._key(inputs)
        shape = (int(self._lengths[rows].sum()), self._width)
        stored = self._stored_dtype or self._dtype
        states = self._disk.get(key, shape, stored)
        if states is None:
            computed = self._compute(prefix, inputs, rows)
            self._disk.put(key, computed)
            # The mapped file replaces the computed tensor: processes share it, and the operating
            # system can evict it from memory.
            states = self._disk.get(key, shape, stored)
            if states is None:
                return computed
        return states.to(self._backbone.device)

    def _compute(self, prefix: Prefix, inputs: Batch, rows: Indices) -> Tensor:
        on_device = {name: tensor.to(self._backbone.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            states = prefix.states(lambda: self._task.forward(self._backbone.model, on_device))
        lengths = chain(*self._sequence_lengths(rows))
        computed = torch.cat([own[:length] for own, length in zip(states, lengths, strict=True)])
        if self._stored_dtype is None:
            return computed
        rounded = computed.to(self._stored_dtype)
        if not bool(rounded.isfinite().all()) and bool(computed.isfinite().all()):
            largest = float(computed.abs().max())
            raise RecipeError(
                f"training.prefix_dtype: the frozen layers' outputs reach {largest:.3g}, beyond "
                "the range of float16; use bfloat16, or remove the key"
            )
        return rounded

    def _key(self, inputs: Batch) -> str:
        """Return a digest of everything that determines the bits of the states."""
        content = [part for name in sorted(inputs) for part in (name, inputs[name])]
        form = [] if self._stored_dtype is None else [f"stored in {self._stored_dtype}"]
        return digest([self._identity, *computation(self._backbone.device), *form, *content]).hex()

    def _read(self, rows: Indices) -> Tensor:
        """Return the states of a batch, ``(sequences, length, width)``; zeros for padding."""
        views: list[Tensor] = []
        for part, start, total, lengths in zip(
            self._part_of[rows].tolist(),
            self._starts[rows].tolist(),
            self._lengths[rows].tolist(),
            self._sequence_lengths(rows),
            strict=True,
        ):
            views += torch.split(self._states[part][start : start + total], lengths)
        return pad_sequence(views, batch_first=True).to(self._dtype)

    def _sequence_lengths(self, rows: Indices) -> list[list[int]]:
        """Return the number of positions of each sequence, as one list per example.

        Zeros extend all lists to the length of the longest list.
        """
        if self._examples.sequences is None:
            return [[length] for length in self._lengths[rows].tolist()]
        held = [self._examples.sequences[row].tolist() for row in rows]
        most = max(map(len, held))
        return [own + [0] * (most - len(own)) for own in held]

    # ---- the trial -------------------------------------------------------------------------------

    def _try_model(self, prefix: Prefix) -> str | None:
        """Try the cache on one batch. If it can be used, divide all examples into parts.

        Returns:
            The reason why the cache cannot be used, or None.
        """
        held = np.unique(np.concatenate(list(self._groups)))
        sizes = self._examples.lengths[held]
        trial = [int(sizes.argmin()), int(sizes.argmax())]
        rows = held[trial[1:] if self._task.padding in ("none", "alone") else trial]
        inputs = {
            name: tensor.to(self._backbone.device)
            for name, tensor in self._task.collate(self._examples, rows).items()
        }
        labels = inputs.pop("labels")
        if any(name.startswith("decoder_") for name in inputs):
            return "the decoder and the encoder have different positions"
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
            inside = self._positions(inputs, states, held, rows)
            if inside is None:
                return "the positions of the hidden states do not match the batch's tokens"
            size = (self._stored_dtype or states.dtype).itemsize
            needed = int(self._lengths[held].sum()) * states.shape[2] * size / 1e9
            if needed > self._max_gigabytes:
                log.warning(
                    "the frozen layers' states need %.4g GB, more than the %.4g GB that "
                    "training.prefix_cache allows; raise it for faster training",
                    needed,
                    self._max_gigabytes,
                )
                return "training.prefix_cache is too small"
            try:
                with prefix.replay(states.masked_fill(~inside[:, :, None], 0)):
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
        self._divide()
        self._width, self._dtype = states.shape[2], states.dtype
        if self._disk is not None:
            self._identity = digest(prefix_identity(self._backbone.model, prefix)).hex()
            log.info("the frozen layers' states are kept in %s", self._disk.folder)
        log.info("the frozen layers' states need up to %.2g GB", needed)
        return None

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Set evaluation mode, enable gradients, and seed the random generators inside the context.

        Gradients reveal whether the states depend on trainable tensors. The model's mode and the
        random generators are restored at the end.
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
        logits = self._task.forward(self._backbone.model, inputs)
        return self._task.losses(logits, labels)[0].detach()

    def _positions(
        self, inputs: Batch, states: Tensor, held: Indices, rows: Indices
    ) -> Tensor | None:
        """Set the number of positions of each example.

        Returns:
            Mask of the positions in the batch that are not padding, ``(sequences, length)``; None
            if the numbers of positions are unknown, if the positions of the hidden states do not
            match the batch's tokens, or if the padding is not on the right.
        """
        mask, known = inputs.get("attention_mask"), self._examples.positions
        if known is None and mask is None and len(np.unique(self._examples.lengths[held])) > 1:
            return None
        lengths = states.shape[1] if mask is None else self._examples.lengths[held]
        self._lengths[held] = lengths if known is None else known[held]
        own = torch.tensor([*chain(*self._sequence_lengths(rows))], device=states.device)
        inside = torch.arange(int(own.max()), device=states.device) < own[:, None]
        if states.shape[:2] != inside.shape:
            return None
        if mask is None or known is not None:
            return inside
        there = own > 0  # the empty sequences that fill up an example have a mask too
        shaped = mask.flatten(0, -2) > 0
        return inside if torch.equal(shaped[there], inside[there]) else None

    def _divide(self) -> None:
        """Divide each group into parts of similar lengths, the longest examples first."""
        for group in self._groups:
            own = np.unique(group)
            own = own[self._part_of[own] < 0]  # an example of several groups belongs to the first
            own = own[np.argsort(-self._lengths[own], kind="stable")]
            while len(own):
                count = max(1, _POSITIONS // int(self._lengths[own[0]]))
                for part in split_batch(self._task.padding, self._examples, own[:count]):
                    self._part_of[part] = len(self._parts)
                    lengths = self._lengths[part]
                    self._starts[part] = np.cumsum(lengths) - lengths
                    self._parts.append(part)
                own = own[count:]

"""Runtime of training and evaluation: the loaded model, task and examples of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.training.prefix_cache import PrefixCache

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


@dataclass
class Runtime:
    """One frozen model and the examples of all clients; loaded once, shared by every round."""

    backbone: Backbone
    task: Task
    accelerator: Accelerator
    """Device, autocast, and the gradient scaler in fp16."""
    examples: Examples
    """The encoded table."""
    cache: PrefixCache | None = None
    """Cache that skips the layers before the first trainable one; None if there are none."""

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.backbone.device

    def collate(self, rows: Indices) -> Batch:
        """Stack and pad these examples, on the CPU."""
        return self.task.collate(self.examples, rows)

    def to_device(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a batch's labels and the model's inputs, on the device.

        The labels are not passed to the model, because its own loss would average over clients.
        """
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return inputs.pop("labels"), inputs

    @contextmanager
    def forward_pass(self, rows: Indices) -> Iterator[None]:
        """Run a forward pass on the batch of these examples under autocast and the prefix cache."""
        with self.accelerator.autocast():
            if self.cache is None:
                yield
            else:
                with self.cache.batch_context(rows):
                    yield

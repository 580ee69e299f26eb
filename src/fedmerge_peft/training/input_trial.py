"""Trial of the loaded model on three examples: one batch is compared with single examples.

Models treat padding differently. Some have no attention mask, some read the last position, some
count padding in the position numbers, and recurrent decoders process it. The trial compares passes
with and without padding, and chooses how batches are formed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.tasks.base import Examples, Padding, Task
from fedmerge_peft.util.library_errors import library_errors
from fedmerge_peft.util.seeds import seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

_TOLERANCE, _HALF_TOLERANCE = 3e-4, 0.05
"""Largest relative difference of logits in float32, and in half precision."""

Outputs = list[Tensor]
"""Logits of each example at its own positions."""
Run = Callable[[Indices], Outputs]


def tolerance(backbone: Backbone, accelerator: Accelerator) -> float:
    """Return the largest allowed relative difference between logits of the same examples."""
    exact = accelerator.mixed_precision == "no" and backbone.model.dtype == torch.float32
    return _TOLERANCE if exact else _HALF_TOLERANCE


@torch.no_grad()
def try_inputs(task: Task, backbone: Backbone, accelerator: Accelerator, name: str) -> None:
    """Match the task's inputs to the model, and set ``task.padding`` and ``task.prompt_padding``.

    If the task has no examples for the trial (``Task.probe``), both paddings keep their defaults.
    ``task.prompt_padding`` is set only if the task generates text. Call this function before
    ``task.encode``.

    Args:
        task: Task of the model.
        backbone: Model. Its adapter is restored after the trial.
        accelerator: Precision of the passes.
        name: Name of the model, for error messages.

    Raises:
        BackboneError: The model does not match the tokenizer, does not run on an example of the
            task, returns NaN or logits of a wrong shape, or supports no padding of the task.
    """
    task.match_inputs(backbone.model)
    examples = task.probe()
    if examples is None:
        return
    allowed = tolerance(backbone, accelerator)

    def logits(rows: Indices) -> Outputs:
        batch = task.collate(examples, rows)
        inputs = {key: value.to(backbone.device) for key, value in batch.items() if key != "labels"}
        with accelerator.autocast():
            outputs = task.forward(backbone.model, inputs)
        positions = batch["labels"].shape[1:] if task.per_token else ()
        if task.labels and outputs.shape[1:] != (*positions, len(task.labels)):
            raise BackboneError(
                f"backbone.model: {name} has logits of shape {tuple(outputs.shape)} for "
                f"{len(rows)} example{'s' * (len(rows) > 1)}, but the data have "
                f"{len(task.labels)} labels; the model must return one logit per label"
                f"{' for each token' if task.per_token else ''}"
            )
        return task.own_outputs(outputs, batch)

    def next_tokens(rows: Indices) -> Outputs:
        with accelerator.autocast():
            return list(task.next_logits(backbone.model, examples, rows, backbone.device).unbind())

    backbone.eval()
    held = backbone.row()
    with seeded(0, backbone.device):
        noise = 0.05 * torch.randn(len(held))
    try:
        backbone.load_row((held + noise).to(backbone.device))  # no factor and no head is zero

        def set_padding(padding: Padding) -> None:
            task.padding = padding

        def set_prompt_padding(padding: Padding) -> None:
            task.prompt_padding = padding

        _choose(logits, set_padding, task.paddings, examples, allowed, name)
        if task.generates:
            choices = task.prompt_paddings
            _choose(next_tokens, set_prompt_padding, choices, examples, allowed, name)
    finally:
        backbone.load_row(held.to(backbone.device))


def _choose(
    run: Run,
    set_padding: Callable[[Padding], None],
    choices: Sequence[Padding],
    examples: Examples,
    tolerance: float,
    name: str,
) -> None:
    """Set the first padding with which examples have the same outputs in a batch as alone.

    The choice ``alone`` needs no test. Raises ``BackboneError`` if there is no such padding, or if
    the model fails on a single example or returns NaN for it.
    """
    rows = np.arange(3)  # a short example, and two long ones of the same length
    with library_errors(
        lambda reason: BackboneError(
            f"backbone.model: {name} does not run on the inputs of this task: {reason}; choose "
            "another model, or another tokenizer or image processor in backbone.tokenizer"
        )
    ):
        alone = [run(rows[[row]])[0] for row in rows]
        if any(bool(outputs.isnan().any()) for outputs in alone):
            raise BackboneError(
                f"backbone.model: {name} returns NaN on the inputs of this task; its weights are "
                "damaged, or exceed the range of the number format; set backbone.dtype to float32 "
                "and training.mixed_precision to no, or choose another model"
            )
    for padding in choices:
        set_padding(padding)
        if padding == "alone":
            break
        company = rows[1:] if padding == "none" else rows
        try:
            together = run(company)
        except Exception as error:  # a model without support for padding may raise any error
            kind = type(error).__name__
            log.info("the model fails on a batch with padding=%s: %s: %s", padding, kind, error)
            continue
        expected = [alone[row] for row in company]
        pairs = zip(together, expected, strict=True)
        if all(_agree(output, wanted, tolerance) for output, wanted in pairs):
            break
    else:
        raise BackboneError(
            f"backbone.model: {name} fails on a batch of texts of different lengths, or its "
            "outputs for a text differ from those for the text alone, which this task does not "
            "support; choose another model"
        )
    if padding != choices[0]:
        log.info(
            "with padding=%s, the model fails on a batch, or an example has other outputs in a "
            "batch than alone, so padding=%s is used",
            choices[0],
            padding,
        )


def _agree(output: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if output.shape != wanted.shape:
        return False
    difference = (output.float() - wanted.float()).norm()
    return bool(difference <= tolerance * wanted.float().norm())

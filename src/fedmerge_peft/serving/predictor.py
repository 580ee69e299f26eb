"""Predict with many clients' adapters; clients share passes if the predictions stay the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data import Indices
from fedmerge_peft.data.columns import no_client
from fedmerge_peft.errors import DataError, RunError
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe.error_messages import found
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.merged_adapter import load_shared_state
from fedmerge_peft.tasks import Examples, make_task, task_type
from fedmerge_peft.tasks.cuts import warn_of_cuts
from fedmerge_peft.tasks.passes import split_batch
from fedmerge_peft.tasks.row_names import rows_are_inputs
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.input_trial import try_inputs
from fedmerge_peft.util.library_errors import library_errors
from fedmerge_peft.util.seeds import seeded

if TYPE_CHECKING:
    from datasets import Dataset


log = logging.getLogger(__name__)

Prediction = dict[str, Any] | str
"""Prediction for one input: a completion, or an item of ``Task.answers``, such as
``{"label": name, "score": number}``."""

_MAX_CLIENTS = 16
"""Limit on clients per forward pass. With more, the memory use outweighs the time saved."""


class _Chunk(NamedTuple):
    """A part of one client's inputs."""

    row: Tensor
    """The client's adapter, ``(P,)``."""
    indices: Indices


class Predictor:
    """A run's model and the adapters of all its clients, loaded once.

    Args:
        run: A run with at least one finished round.
        best: Use the round with the lowest validation loss, even if the run serves its last round.
        device: auto (a CUDA GPU if there is one, else the CPU), cpu, mps, cuda, or cuda:1.

    Raises:
        RunError: The round does not exist, the adapters do not fit the model that is loaded now, or
            the run's strategy has no ``single_adapter`` per client.
        BackboneError: The model cannot be loaded, does not run on the task's inputs, or comes with
            code to which the caller did not consent.
        DeviceError: There is no such device, or it does not support the recipe's precision or
            optimizer.
    """

    def __init__(self, run: RunDirectory, *, best: bool = False, device: str = "auto") -> None:
        if not run.recipe.strategy.single_adapter:
            raise RunError(
                f"{run.path}: {run.recipe.strategy.name} mixes the predictions of its adapters, "
                "so a client has no single adapter to predict with; use the scores of the run, or "
                "another strategy"
            )
        soup, weights = run.state(best=best)
        rows = soup.merge(weights, torch.eye(len(weights)))
        self._adapters = dict(zip(run.client_names, rows, strict=True))
        self._labels: list[str] = run.task["labels"]
        recipe = run.trusted_recipe
        recipe = recipe.model_copy(
            update={
                "training": recipe.training.model_copy(update={"device": device}),
                "task": recipe.task.to_predict(run.task.get("format")),
            }
        )
        self._kind = task_type(recipe.task)
        self._recipe = recipe
        self._accelerator = make_accelerator(recipe.training)
        with TemporaryDirectory(prefix="fedmerge-") as scratch:
            folder = model_folder(recipe.backbone, Path(scratch))
            self._task = make_task(
                recipe, self._table(self._kind.probe_inputs(recipe.task)), folder
            )
            self._backbone = load_backbone(
                recipe.backbone,
                recipe.lora,
                self._task,
                folder,
                self._accelerator.device,
                recipe.seed,
            )
        try_inputs(self._task, self._backbone, self._accelerator, recipe.backbone.model)
        load_shared_state(self._backbone, soup, run)

    def __call__(
        self, inputs: Mapping[str, Iterable[Any]], *, batch_size: int | None = None
    ) -> dict[str, list[Prediction]]:
        """Predict with each client's own adapter.

        Args:
            inputs: A list of inputs for each client. The task determines what an input is, such as
                a text, a pair of texts, a PIL image or the path of an image file. For a language
                model, it is a prompt formatted as in training, or a chat: a list of messages, which
                the chat template formats.
            batch_size: Largest number of inputs in a forward pass. Default: the recipe's
                ``evaluation.batch_size``.

        Returns:
            A list of predictions for each client, in the order of its inputs. A language model
            returns completions, generated with the recipe's settings. Other tasks return
            dictionaries (``Task.answers``); a classifier returns the most likely label and its
            probability, ``{"label": name, "score": probability}``. Sampled completions are the same
            in each call with the same arguments.

        Raises:
            RunError: The run has no such client.
            DataError: The task does not accept an input, or a client has one input instead of a
                list of them.
        """
        inputs = _lists(inputs)
        if unknown := [client for client in inputs if client not in self._adapters]:
            raise RunError(f"the run {no_client(unknown[0], self._adapters)}")
        all_inputs = [item for items in inputs.values() for item in items]
        if not all_inputs:
            return {client: [] for client in inputs}
        examples = self._encode(all_inputs)
        warn_of_cuts(examples, {"": np.arange(len(all_inputs))}, "inputs")
        indices_of, start = {}, 0
        for client, items in inputs.items():
            indices_of[client] = np.arange(start, start := start + len(items))
        predictions: dict[int, Prediction] = {}
        for chunks in self._passes(
            indices_of, examples, batch_size or self._recipe.evaluation.batch_size
        ):
            predictions |= self._predict(examples, chunks)
        return {
            client: [predictions[index] for index in indices.tolist()]
            for client, indices in indices_of.items()
        }

    def stream(self, client: str, prompt: Any, on_text: Callable[[str], None]) -> str:
        """Complete one prompt with a client's adapter, and pass on the text as it is generated.

        Args:
            client: The client's name.
            prompt: A text, or a list of messages.
            on_text: Function that receives each new part of the completion.

        Returns:
            The completion: all parts joined. Sampling uses torch's random state.

        Raises:
            RunError: The run has no such client, or its task does not generate text.
            DataError: The task does not accept the prompt.
        """
        if client not in self._adapters:
            raise RunError(f"the run {no_client(client, self._adapters)}")
        if not self._kind.completes:
            raise RunError(
                f"the task {self._recipe.task.name} does not generate text to stream; call the "
                "predictor with a list of inputs for each client"
            )
        examples = self._encode([prompt])
        warn_of_cuts(examples, {"": np.arange(1)}, "prompts")
        self._backbone.eval()
        with self._applied(self._adapters[client][None]), self._accelerator.autocast():
            return self._task.stream(self._backbone.model, examples, on_text, self._backbone.device)

    @cached_property
    def sequential_reason(self) -> str | None:
        """Reason to predict for one client at a time; None if clients can share a forward pass.

        Shared passes give the same predictions up to rounding.
        """
        if {"none", "alone"} & {self._task.padding, self._task.prompt_padding}:
            reason: str | None = (
                "the model's outputs depend on padding or on the other inputs of a pass"
            )
        else:
            reason = stacking_obstacle(self._backbone) or self._stacking_error()
        if reason is not None:
            log.info("predicting for one client at a time: %s", reason)
        return reason

    # ---- inputs ----------------------------------------------------------------------------------

    def _encode(self, inputs: list[Any]) -> Examples:
        with (
            library_errors(lambda reason: DataError(f"an input cannot be read: {reason}")),
            rows_are_inputs(range(len(inputs))),
        ):
            if self._kind.completes:
                return self._task.encode_prompts(inputs)
            return self._task.encode(self._table(inputs))

    def _table(self, inputs: list[Any]) -> Dataset:
        return self._kind.input_table(self._recipe.task, self._labels, inputs)

    def _passes(
        self, indices_of: Mapping[str, Indices], examples: Examples, batch_size: int
    ) -> Iterator[list[_Chunk]]:
        """Yield the chunks of each forward pass, in the order of decreasing size and length.

        Chunks of one pass are similar in size and length, so that little padding is needed.
        """
        clients = [client for client, indices in indices_of.items() if len(indices)]
        stacked = min(len(clients), _MAX_CLIENTS, batch_size)
        stacked = 1 if stacked < 2 or self.sequential_reason is not None else stacked
        size = max(1, batch_size // stacked)
        chunks = []
        for client in clients:
            indices = indices_of[client]
            indices = indices[np.argsort(-examples.lengths[indices], kind="stable")]
            parts = [indices[start : start + size] for start in range(0, len(indices), size)]
            if not self._kind.completes:  # Task.complete splits prompts itself, by prompt_padding
                padding = self._task.padding
                parts = [own for part in parts for own in split_batch(padding, examples, part)]
            chunks += [_Chunk(self._adapters[client], part) for part in parts]
        chunks.sort(
            key=lambda chunk: (-len(chunk.indices), -int(examples.lengths[chunk.indices].max()))
        )
        for start in range(0, len(chunks), stacked):
            yield chunks[start : start + stacked]

    # ---- predictions -----------------------------------------------------------------------------

    @torch.no_grad()
    def _predict(self, examples: Examples, chunks: Sequence[_Chunk]) -> dict[int, Prediction]:
        """Predict for chunks that share a pass; return predictions by input index.

        Shorter chunks are padded with repeated inputs, whose predictions are dropped.
        """
        width = max(len(chunk.indices) for chunk in chunks)
        batch = np.concatenate([np.resize(chunk.indices, width) for chunk in chunks])
        self._backbone.eval()
        rows = torch.stack([chunk.row for chunk in chunks])
        with self._applied(rows), self._accelerator.autocast():
            if self._kind.completes:
                predictions: list[Prediction] = [
                    *self._task.complete(
                        self._backbone.model, examples, batch, self._backbone.device
                    )
                ]
            else:
                logits = self._logits(examples, batch)
                predictions = [*self._task.answers(logits, examples, batch)]
        return {
            int(index): predictions[number * width + position]
            for number, chunk in enumerate(chunks)
            for position, index in enumerate(chunk.indices)
        }

    def _applied(self, rows: Tensor) -> Any:
        """Return a context in which the i-th of K equal parts of a batch uses adapter i.

        Args:
            rows: Adapters, ``(K, P)``.
        """
        if len(rows) > 1:
            return AdapterStack(self._backbone, rows.to(self._backbone.device)).applied()
        self._backbone.load_row(rows[0])
        return nullcontext()

    def _logits(self, examples: Examples, indices: Indices) -> Tensor:
        """Return the task's logits; for prompts, next-token logits ``(batch, vocabulary)``."""
        collate = self._task.collate_prompts if self._kind.completes else self._task.collate
        batch = collate(examples, indices)
        inputs = {
            name: tensor.to(self._backbone.device)
            for name, tensor in batch.items()
            if name != "labels"
        }
        run = self._task.prompt_logits if self._kind.completes else self._task.forward
        return run(self._backbone.model, inputs).float()

    @torch.no_grad()
    def _stacking_error(self) -> str | None:
        """Check that one pass with two very different adapters gives the logits of two passes.

        Returns:
            The reason why clients cannot share a pass, or None if the logits agree.
        """
        examples = self._encode(self._kind.probe_inputs(self._recipe.task))
        indices = np.arange(2)
        self._backbone.eval()
        with seeded(0, self._backbone.device):
            current = self._backbone.row()
            rows = current + 0.05 * torch.randn(2, len(current))
        try:
            with self._applied(rows), self._accelerator.autocast():
                shared = self._logits(examples, indices)
        except Exception as error:  # models whose layers do not keep the shape (batch, ..., width)
            return f"the model does not run with several adapters ({type(error).__name__}: {error})"
        exact = (
            self._accelerator.mixed_precision == "no"
            and self._backbone.model.dtype == torch.float32
        )
        tolerance = 1e-3 if exact else 0.05
        for number, row in enumerate(rows):
            with self._applied(row[None]), self._accelerator.autocast():
                alone = self._logits(examples, indices)[number]
            if not bool((shared[number] - alone).norm() <= tolerance * alone.norm()):
                return (
                    "the logits of a shared pass differ from those of separate passes, because the "
                    "model's layers mix the examples of a batch or do not apply adapters as PEFT's "
                    "LoRA layers do"
                )
        return None


def _lists(inputs: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    """Return the inputs of each client as a list.

    Raises:
        DataError: ``inputs`` is not a mapping, or a client has one input instead of a list. Python
            would otherwise split a text into its letters, and a table into its column names.
    """
    if not isinstance(inputs, Mapping):
        raise DataError(
            f'inputs: found {found(inputs)}, expected lists by client, such as {{"north": ["..."]}}'
        )
    lists = {}
    for client, items in inputs.items():
        several = isinstance(items, Iterable) and not hasattr(items, "columns")
        if not several or isinstance(items, str | bytes | bytearray | Mapping | Set):
            raise DataError(
                f"{client}: found {found(items)}, expected a list of inputs, even for a single "
                "input"
            )
        try:
            lists[client] = list(items)
        except TypeError:  # an array without dimensions
            raise DataError(f"{client}: found {found(items)}, expected a list of inputs") from None
    return lists

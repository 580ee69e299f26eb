"""What many clients' adapters say of many inputs, several clients in one pass of the model where that is exact."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data import Indices
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError, RunError
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.merged_adapter import fit
from fedmerge_peft.tasks import Examples, make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.util.seeds import seeded

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import TaskSection
    from fedmerge_peft.tasks.causal_lm import CausalLMTask

log = logging.getLogger(__name__)

Prediction = dict[str, Any] | str
"""``{"label": name, "score": probability}`` for classification, the completion for a language model."""

_MOST = 16
"""Clients in a pass: with more of them, their adapters take more memory than the pass saves time."""


class _Part(NamedTuple):
    """Some inputs of one client."""

    row: Tensor
    """Its adapter, ``(P,)``."""
    indices: Indices


class Predictor:
    """A run's model with all of its clients' adapters, loaded once, for inputs of any of them.

    Args:
        run: A run of which at least a round is done.
        best: Take the round with the lowest validation loss, instead of the last.
        device: auto (a CUDA GPU where there is one, else the CPU), cpu, mps, cuda, or cuda:1.

    Raises:
        RunError: There is no such round; adapters do not fit the model as it loads today; or a run of ``fedem``, whose clients have
            no single adapter.
        BackboneError: The model cannot be loaded.
        DeviceError: There is no such device.
    """

    def __init__(self, run: RunDirectory, *, best: bool = False, device: str = "auto") -> None:
        if run.recipe.strategy.name == "fedem":
            raise RunError(
                f"{run.path}: fedem mixes what its adapters predict, so a client has no single adapter to predict with"
            )
        soup, weights = run.state(best=best)
        self._adapters = dict(zip(run.client_names, soup.merge(weights), strict=True))
        self._labels: list[str] = run.task["labels"]
        recipe = run.recipe.model_copy(
            update={"training": run.recipe.training.model_copy(update={"device": device})}
        )
        if recipe.task.name == "causal-lm":
            generating = {"format": "prompt-completion", "metrics": ["exact_match"]}
            recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update=generating)})
        self._recipe = recipe
        self._accelerator = make_accelerator(recipe.training)
        with TemporaryDirectory(prefix="fedmerge-") as scratch:
            folder = model_folder(recipe.backbone.model, Path(scratch))
            self._task = make_task(recipe, _table(recipe.task, self._labels, None), folder)
            self._backbone = load_backbone(
                recipe.backbone,
                recipe.lora,
                self._task,
                folder,
                self._accelerator.device,
                recipe.seed,
            )
        fit(self._backbone, soup, run)

    def __call__(
        self, inputs: Mapping[str, Sequence[Any]], *, batch_size: int | None = None
    ) -> dict[str, list[Prediction]]:
        """Predictions of each client's own adapter, in the order of its inputs.

        Args:
            inputs: By client: texts, or pairs of texts where the task has pairs; PIL images or paths of image files; for a language
                model prompts, laid out as in training.
            batch_size: Inputs in a pass of the model; by default the recipe's ``evaluation.batch_size``.

        Returns:
            ``{"label": name, "score": probability}`` of the likeliest label for each input; for a language model its greedy completion,
            of at most ``task.max_new_tokens`` tokens.

        Raises:
            RunError: The run has no such client.
            DataError: An input is not what the task takes.
        """
        if unknown := [client for client in inputs if client not in self._adapters]:
            raise RunError(
                f"the run has no client {unknown[0]!r}; it has {join_values(self._adapters)}"
            )
        flat = [each for client in inputs for each in inputs[client]]
        if not flat:
            return {client: [] for client in inputs}
        examples = self._encode(flat)
        owned, start = {}, 0
        for client, given in inputs.items():
            owned[client] = np.arange(start, start := start + len(given))
        answers: dict[int, Prediction] = {}
        for parts in self._passes(
            owned, examples, batch_size or self._recipe.evaluation.batch_size
        ):
            answers |= self._answer(examples, parts)
        return {
            client: [answers[index] for index in indices.tolist()]
            for client, indices in owned.items()
        }

    @cached_property
    def reason(self) -> str | None:
        """Why clients predict one at a time; None where several share a pass of the model, with the same predictions to rounding."""
        reason = stacking_obstacle(self._backbone) or self._disagreement()
        if reason is not None:
            log.info("clients predict one at a time: %s", reason)
        return reason

    # ---- inputs ------------------------------------------------------------------------------------

    def _encode(self, inputs: list[Any]) -> Examples:
        if self._recipe.task.name == "causal-lm":
            _refuse([each for each in inputs if not isinstance(each, str)], "a text")
            return cast("CausalLMTask", self._task).encode_prompts(inputs)
        return self._task.encode(_table(self._recipe.task, self._labels, inputs))

    def _passes(
        self, owned: Mapping[str, Indices], examples: Examples, batch_size: int
    ) -> Iterator[list[_Part]]:
        """Parts that share a pass: alike in number and length, so that little is filled up. The longest come first."""
        present = [client for client, indices in owned.items() if len(indices)]
        together = min(len(present), _MOST, batch_size)
        together = 1 if together < 2 or self.reason is not None else together
        size = max(1, batch_size // together)
        parts = []
        for client in present:
            indices = owned[client][np.argsort(-examples.lengths[owned[client]], kind="stable")]
            parts += [
                _Part(self._adapters[client], indices[at : at + size])
                for at in range(0, len(indices), size)
            ]
        parts.sort(
            key=lambda part: (-len(part.indices), -int(examples.lengths[part.indices].max()))
        )
        for at in range(0, len(parts), together):
            yield parts[at : at + together]

    # ---- answers -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _answer(self, examples: Examples, parts: Sequence[_Part]) -> dict[int, Prediction]:
        """One pass: predictions by the numbers of the inputs. Shorter parts are filled up with inputs whose answers are dropped."""
        width = max(len(part.indices) for part in parts)
        chunk = np.concatenate([np.resize(part.indices, width) for part in parts])
        self._backbone.eval()
        with self._holding(torch.stack([part.row for part in parts])), self._accelerator.autocast():
            if self._recipe.task.name == "causal-lm":
                said: list[Prediction] = [
                    *cast("CausalLMTask", self._task).complete(
                        self._backbone.model, examples, chunk, self._backbone.device
                    )
                ]
            else:
                said = [*self._named(self._logits(examples, chunk))]
        return {
            int(index): said[number * width + place]
            for number, part in enumerate(parts)
            for place, index in enumerate(part.indices)
        }

    def _holding(self, rows: Tensor) -> Any:
        """Within, the first of K parts of a batch passes through the first of these adapters ``(K, P)``, and so on."""
        if len(rows) > 1:
            return AdapterStack(self._backbone, rows.to(self._backbone.device)).applied()
        self._backbone.load_row(rows[0])
        return nullcontext()

    def _logits(self, examples: Examples, chunk: Indices) -> Tensor:
        """``(batch, classes)``; of a language model those of the next token, ``(batch, vocabulary)``."""
        decoder = self._recipe.task.name == "causal-lm"
        task = self._task
        batch = (
            cast("CausalLMTask", task).collate_prompts(examples, chunk)
            if decoder
            else task.collate(examples, chunk)
        )
        inputs = {
            name: tensor.to(self._backbone.device)
            for name, tensor in batch.items()
            if name != "labels"
        }
        logits: Tensor = self._backbone.model(**inputs).logits.float()
        return logits[:, -1] if decoder else logits

    def _named(self, logits: Tensor) -> Iterator[dict[str, Any]]:
        scores, labels = torch.softmax(logits, dim=-1).max(dim=-1)
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True):
            yield {"label": self._labels[label], "score": score}

    @torch.no_grad()
    def _disagreement(self) -> str | None:
        """Two adapters that differ much, on two inputs: in one pass as alone?"""
        examples = self._encode(_specimens(self._recipe.task))
        chunk = np.arange(2)
        self._backbone.eval()
        with seeded(0, self._backbone.device):
            held = self._backbone.row()
            rows = held + 0.05 * torch.randn(2, len(held))
        try:
            with self._holding(rows), self._accelerator.autocast():
                together = self._logits(examples, chunk)
        except Exception as error:  # whatever a model stumbles over whose layers do not keep to (batch, ..., width)
            return f"the model does not run with several adapters ({type(error).__name__}: {error})"
        for number, row in enumerate(rows):
            with self._holding(row[None]), self._accelerator.autocast():
                alone = self._logits(examples, chunk)[number]
            exact = (
                self._accelerator.mixed_precision == "no"
                and self._backbone.model.dtype == torch.float32
            )
            if not bool(
                (together[number] - alone).norm() <= (1e-3 if exact else 0.05) * alone.norm()
            ):
                return "the model's layers mix the examples of a batch, or use an adapter in a way of their own"
        return None


def _specimens(task: TaskSection) -> list[Any]:
    """Two inputs that any model of the task takes."""
    if task.name == "image-classification":
        from PIL.Image import new

        return [new("RGB", (32, 32), color) for color in ("black", "orange")]
    texts = ["a", "another text, which is longer"]
    return [(text, text) for text in texts] if getattr(task, "text_pair", None) else texts


def _table(task: TaskSection, labels: list[str], inputs: list[Any] | None) -> Dataset:
    """Inputs as rows with the task's columns, under some label, as the task wants one; with ``None`` for two specimens."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    inputs = _specimens(task) if inputs is None else inputs
    if task.name == "causal-lm":
        return Dataset.from_dict({task.prompt: inputs, task.completion: inputs})
    if task.name == "image-classification":
        from PIL.Image import Image as Picture

        _refuse(
            [each for each in inputs if not isinstance(each, Picture | str | Path)],
            "a PIL image, or the path of a file",
        )
        columns: dict[str, Any] = {task.image: Image()}
        rows = [[each if isinstance(each, Picture) else str(each)] for each in inputs]
    else:
        columns = {
            name: Value("string") for name in (task.text, task.text_pair) if name is not None
        }
        pairs = len(columns) == 2
        rows = [
            list(each) if pairs and isinstance(each, tuple | list) else [each] for each in inputs
        ]
        unfit = [
            row
            for row in rows
            if len(row) != len(columns) or not all(isinstance(text, str) for text in row)
        ]
        _refuse(
            [row if pairs else row[0] for row in unfit], "a pair of texts" if pairs else "a text"
        )
    features = Features({**columns, task.label: ClassLabel(names=labels)})
    listed = [{**dict(zip(columns, row, strict=True)), task.label: 0} for row in rows]
    return Dataset.from_list(listed, features=features)


def _refuse(unfit: list[Any], wanted: str) -> None:
    if unfit:
        raise DataError(f"an input is {wanted}, not {unfit[0]!r}")

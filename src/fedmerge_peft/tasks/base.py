"""Base class of tasks: encoding, loss and predictions of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import blank_table, infer_labels, relabel
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.shown import ShownExample

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from fedmerge_peft.recipe.backbone import BackboneRecipe

ComputeMetrics = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]
"""``compute_metrics(predictions, references)``, which returns numbers by name."""
Batch = dict[str, Tensor]
"""Keyword arguments of the model. Batches of examples, but not of prompts, also have ``labels``."""
SEQUENCES = "sequences"
"""Column with the lengths of an example's sequences, such as its choices or windows."""
Padding = Literal["right", "left", "none", "alone"]
"""Side on which shorter examples are padded. none: all examples of a pass have the same length;
alone: a pass has one example."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples or prompts: one tensor per example and column."""

    columns: Mapping[str, Sequence[Tensor]]
    cuts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Indices of the examples that a warning counts, such as truncated or empty ones. Each key is a
    predicate, such as ``are longer than 32 tokens and were truncated``."""
    positions: NDArray[np.int64] | None = None
    """Number of positions of each example in the model's layers, ``(n,)``. None if the batch
    determines it: one position per token, or equally many for all examples."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def sequences(self) -> Sequence[Tensor] | None:
        """Lengths of each example's concatenated sequences; None for tasks with one per example."""
        return self.columns.get(SEQUENCES)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of elements in the first column of each example, such as tokens, ``(n,)``."""
        first = next(iter(self.columns.values()))
        return np.array([tensor.numel() for tensor in first], dtype=np.int64)


class Task(ABC):
    """Encoding of rows as tensors, loss of an example, and predictions for metrics."""

    auto_model: ClassVar[str]
    """Transformers class that loads the backbone, such as AutoModelForCausalLM."""
    peft_task_type: ClassVar[str | None]
    """PEFT's task type, such as SEQ_CLS; None if PEFT has no type for the task's models."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Names of the task's heads in transformers. They belong to the adapter, and the pretrained
    model may lack them. Empty for tasks that use the pretrained output layer."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Names of modules that the task does not read, and that the pretrained model may lack."""
    config_options: ClassVar[Mapping[str, Any]] = {}
    """Values to set in the model's configuration, such as ``problem_type``."""
    in_batch: ClassVar[bool] = False
    """True if the loss of an example depends on the other examples of its client's batch."""
    mixes: ClassVar[bool] = True
    """True if the outputs of several models may be mixed (``mix``)."""
    names_classes: ClassVar[bool] = False
    """True if each loss term has one class, so that a confusion matrix can count the terms."""
    smallest_batch: int = 1
    """Smallest number of examples for which the loss of a batch is not constant."""
    per_token: ClassVar[bool] = False
    """True if a head for labels returns logits per token; False if it returns them per example."""
    pipeline: ClassVar[str] = ""
    """Pipeline of transformers, also the task's name on the hub; empty if there is none."""
    reads_last_token: ClassVar[bool] = False
    """True if a decoder's head reads the last token before the padding and needs the padding id."""
    completes: ClassVar[bool] = False
    """True if predictions are completions of prompts; False if one forward pass returns them."""
    loading_code: ClassVar[str] = ""
    """Python code for model cards that loads the backbone and, at ``{load}``, an adapter."""
    metrics: Sequence[str]
    """Names of the metrics. Tables show the first one."""
    labels: Sequence[str]
    """Names of the outputs of the model's head, one logit each. Empty if they have no names."""
    compute_metrics: ComputeMetrics | None = None
    """Function that computes further metrics; None if there are no further metrics."""
    processor: Any
    """Tokenizer, image processor or feature extractor of the backbone."""
    pad_token_id: int | None = None
    """Id with which tokens are padded; None for a task that does not read tokens."""
    format: str | None = None
    """Format of the texts; None for a task with only one format."""
    generates: bool = False
    """True if a metric needs generated text."""
    padding: Padding = "right"
    """Padding of batches. ``training/input_trial.py`` chooses it for the loaded model."""
    paddings: ClassVar[Sequence[Padding]] = ("right", "left", "none", "alone")
    """Choices for ``padding``, the best first. A model whose outputs allow none is refused."""
    prompt_padding: Padding = "left"
    """Padding of prompts for generation, chosen like ``padding``."""
    prompt_paddings: ClassVar[Sequence[Padding]] = ("left", "none", "alone")
    """Choices for ``prompt_padding``, the best first."""

    def __init__(  # noqa: B027 - a task may have nothing to prepare
        self, recipe: Any, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        """Prepare the task.

        Args:
            recipe: The recipe's section ``task``.
            backbone: The recipe's section ``backbone``.
            table: Rows that determine labels and format; on one machine, all of the federation.
            model_folder: Local folder or hub id of the model.
        """

    @abstractmethod
    def encode(self, table: Dataset) -> Examples:
        """Convert rows to tensors. Raises ``DataError`` if the rows do not match the recipe."""

    def show(self, table: Dataset) -> list[ShownExample]:
        """Return each row after tokenization and truncation, for ``fedmerge data --show``.

        Raises:
            DataError: The task does not read texts, or the rows do not match the recipe.
        """
        raise DataError("the examples of this task cannot be shown; omit --show")

    @abstractmethod
    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack and pad examples into the model's keyword arguments and ``labels``, on the CPU."""

    def forward(self, model: Any, inputs: Batch) -> Tensor:
        """Run the model on a batch without ``labels``; return input for ``losses`` and ``predict``.

        The first dimension follows the order of the batch. If K adapters share the pass, it has K
        equal, consecutive parts, one per adapter.
        """
        logits: Tensor = model(**inputs).logits
        return logits

    def own_outputs(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        """Return the output of ``forward`` for each example, without padding."""
        mask = batch.get("attention_mask")
        if logits.ndim != 3 or mask is None:
            return list(logits.unbind())
        inside = mask.to(logits.device).bool()
        return [row[own] for row, own in zip(logits, inside, strict=True)]

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the summed loss and the number of loss terms of each example.

        Args:
            logits: Output of ``forward``, such as ``(batch, classes)`` or ``(batch, length,
                vocabulary)``. With ``token_targets``, it may also be the logits at the n targets
                alone, ``(n, vocabulary)``, or their cross-entropies, ``(n,)``.
            labels: Such as ``(batch,)`` or ``(batch, length)``; -100 marks places without a label.

        Returns:
            Two float32 tensors ``(batch,)``: summed losses (nats or squared errors), and counts.
        """

    def training_losses(
        self, logits: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> Tensor:
        """Compute the summed training loss of each example, ``(batch,)``.

        Args:
            logits: As in ``losses``.
            labels: As in ``losses``.
            class_weights: Weights of the labels in the loss of each example, ``(batch, labels)``;
                None if all are 1.
        """
        return self.losses(logits, labels)[0]

    def loss_divisor(self, labels: Tensor, class_weights: Tensor | None) -> float:
        """Return the divisor of a batch's losses: the number of loss terms.

        With class weights, it is the sum of the terms' weights. Arguments: see ``training_losses``.
        """
        return self.count_terms(labels)

    def class_weights(self, examples: Examples, indices: NDArray[Any]) -> Tensor | None:
        """Return weights of labels for a client's training loss, ``(labels,)``; None if all are 1.

        Args:
            examples: Output of ``encode``.
            indices: The client's training examples.
        """
        return None

    def token_targets(self, labels: Tensor) -> Tensor | None:
        """Return the target of each position, ``(batch, length)``; -100 where no logits are needed.

        Return None if ``losses`` and ``predict`` need the logits of all positions.
        """
        return None

    def match_inputs(self, model: Any) -> None:  # noqa: B027 - most tasks have nothing to match
        """Adapt encoding and model configuration to each other; check the tokenizer of the model.

        Raises:
            BackboneError: The model does not match the tokenizer, or does not suit the task.
        """

    def probe(self) -> Examples | None:
        """Return a short example and two long ones of equal length, to try the model.

        If the task has no padding, all three have the same length. None skips the trial.
        """
        return None

    def next_logits(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> Tensor:
        """Return logits of the first two generated tokens, ``(batch, 2, vocabulary)``.

        Only tasks that generate text implement this method.
        """
        raise TypeError(f"{type(self).__name__} does not generate text")

    def finish(self, model: Any, examples: Examples, device: torch.device) -> Examples:
        """Add values that depend on the loaded model to a run's examples, once after ``encode``.

        Args:
            model: PEFT model with any adapter.
            examples: Output of ``encode``.
            device: Device of the model.
        """
        return examples

    def count_terms(self, labels: Tensor) -> int:
        """Count the loss terms of a batch with these labels, without a forward pass."""
        return int((labels != -100).sum())

    @abstractmethod
    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return outputs and references of a batch by kind, such as ``classes``.

        A metric is registered with the kinds that it compares (``of``). Arguments: see ``losses``.
        """

    def outputs(
        self, logits: Tensor, labels: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Mapping[str, Compared]:
        """Return outputs and references as in ``predict``, with the help of examples if needed."""
        return self.predict(logits, labels)

    def mix(self, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the logits of a mixture of models, log Σ_k π_k softmax(logits_k).

        Args:
            logits: Logits of each model, as in ``losses``.
            weights: π, ``(K,)``.
        """
        parts = [
            torch.log_softmax(component.float(), dim=-1) + weight.log().to(component.device)
            for component, weight in zip(logits, weights, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), dim=0)

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the result of ``run.predict`` for each example. Not for tasks with ``completes``.

        Args:
            logits: Output of ``forward`` for these examples, as float32.
            examples: Output of ``encode``.
            indices: Examples of the batch.
        """
        raise TypeError(f"{type(self).__name__} does not predict single inputs")

    @classmethod
    def check_table(cls, recipe: Any, table: Dataset) -> None:
        """Check the columns of a table, without a tokenizer or a model.

        Args:
            recipe: The task's section.
            table: Rows.

        Raises:
            DataError: A column does not exist, or has unsuitable or missing values.
        """
        return

    @classmethod
    def labels_in(cls, recipe: Any, table: Dataset) -> list[str] | None:
        """Return the names of the labels in a table; None for a task without named labels.

        Raises ``DataError`` if the rows do not match the recipe.
        """
        column = recipe.label_column
        return None if column is None else infer_labels(table, column, None)

    @classmethod
    def format_in(cls, recipe: Any, table: Dataset) -> str | None:
        """Return the text format of a table; None for a task with only one format."""
        return None

    @classmethod
    def relabel(cls, recipe: Any, table: Dataset, labels: Sequence[str]) -> Dataset:
        """Replace a site's labels by their indices in ``labels``, the labels of all sites.

        Raises ``DataError`` for any other label.
        """
        column = recipe.label_column
        return table if column is None else relabel(table, column, labels)

    @classmethod
    def placeholder(cls, recipe: Any, labels: Sequence[str], columns: Sequence[str]) -> Dataset:
        """Return a table with these columns and all labels, but without real examples.

        A server without data builds its task from this table.
        """
        from datasets import Value

        texts = {name: Value("string") for name in columns}
        return blank_table(texts, [[""] * len(columns)], cls.blanks(recipe, labels))

    @classmethod
    def blanks(cls, recipe: Any, labels: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """Return the feature type and a placeholder value of each column of labels or targets."""
        from datasets import ClassLabel

        column = recipe.label_column
        return {} if column is None else {column: (ClassLabel(names=list(labels)), 0)}

    @classmethod
    def probe_inputs(cls, recipe: Any) -> list[Any]:
        """Return two different inputs that all models of the task accept."""
        raise TypeError(f"{cls.__name__} does not predict single inputs")

    @classmethod
    def input_table(cls, recipe: Any, labels: list[str], inputs: list[Any]) -> Dataset:
        """Convert inputs of predictions to rows for ``encode``, with placeholder labels if needed.

        Raises ``DataError`` for an input that the task does not accept.
        """
        raise TypeError(f"{cls.__name__} does not predict single inputs")

    @classmethod
    def pipeline_options(cls, recipe: Any, backbone: BackboneRecipe, folder: str) -> dict[str, Any]:
        """Return arguments of ``transformers.pipeline``, such as the tokenizer."""
        return {}

    def encode_prompts(self, prompts: Sequence[Any]) -> Examples:
        """Encode prompts without completions. Only for tasks with ``completes``.

        Raises ``DataError`` for a prompt that the task does not accept.
        """
        raise TypeError(f"{type(self).__name__} does not complete prompts")

    def collate_prompts(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack prompts, padded for generation. Only for tasks with ``completes``."""
        raise TypeError(f"{type(self).__name__} does not complete prompts")

    def prompt_logits(self, model: Any, prompts: Batch) -> Tensor:
        """Return the logits of the token after each prompt, ``(batch, vocabulary)``."""
        logits: Tensor = model(**prompts).logits
        return logits[:, -1]

    def complete(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> list[str]:
        """Return a completion of each prompt. Only for tasks with ``completes``."""
        raise TypeError(f"{type(self).__name__} does not complete prompts")

    def stream(
        self, model: Any, examples: Examples, on_text: Callable[[str], None], device: torch.device
    ) -> str:
        """Complete the only prompt of ``examples``, and return the completion.

        ``on_text`` receives each new part of the completion. Only for tasks with ``completes``.
        """
        raise TypeError(f"{type(self).__name__} does not complete prompts")

    @torch.no_grad()
    def generate(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> tuple[list[str], list[str]]:
        """Return generated and reference texts of examples. Only for tasks with ``generates``."""
        raise TypeError(f"{type(self).__name__} does not generate text")

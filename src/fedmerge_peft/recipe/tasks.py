"""Sections of the task: columns, lengths and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe.registered import NameIn, OneOf
from fedmerge_peft.recipe.section import Count, Labels, Section

_ARITHMETIC = "fedmerge_peft.tasks.metrics"
METRICS.add(
    "perplexity",
    f"{_ARITHMETIC}:perplexity",
    about="exp of the mean loss; lower is better.",
    of=("loss",),
    range=(0.0, math.inf),
    greater_is_better=False,
)
METRICS.add(
    "accuracy",
    f"{_ARITHMETIC}:accuracy",
    about="Fraction of the classes or tokens that are predicted correctly.",
    of=("classes", "tokens"),
    range=(0.0, 1.0),
)
METRICS.add(
    "f1",
    f"{_ARITHMETIC}:f1",
    about="F1 of each class, averaged with equal weights (macro).",
    of=("classes",),
    range=(0.0, 1.0),
)
METRICS.add(
    "matthews_correlation",
    f"{_ARITHMETIC}:matthews_correlation",
    about="Correlation of predicted and expected classes, from -1 to 1.",
    of=("classes",),
    range=(-1.0, 1.0),
)
METRICS.add(
    "exact_match",
    f"{_ARITHMETIC}:exact_match",
    about="Fraction of the generated texts that equal the references.",
    of=("texts",),
    range=(0.0, 1.0),
)
METRICS.add(
    "rougeL",
    f"{_ARITHMETIC}:rouge_l",
    about="F-measure of the longest common subsequence of words, in any script.",
    of=("texts",),
    range=(0.0, 1.0),
)

ClassificationMetric = Annotated[str, NameIn(METRICS, of=frozenset({"classes"}))]
LanguageMetric = Annotated[str, NameIn(METRICS, of=frozenset({"tokens", "texts", "loss"}))]


class TaskRecipe(Section):
    """Base of a task's section."""

    name: str = ""
    """Name of the task."""
    if TYPE_CHECKING:
        metrics: Sequence[str]
        """Names of the metrics. Tables show the first. Each task declares its own field."""

    @property
    def label_column(self) -> str | None:
        """Column with the labels; None for tasks whose examples have none."""
        return getattr(self, "label", None)

    @property
    def image_column(self) -> str | None:
        """Column with images, which may be paths of files; None for tasks without images."""
        return getattr(self, "image", None)

    def with_format(self, format: str | None) -> Self:
        """Return a copy with the text format set, if the task has several."""
        fixed = "format" in type(self).model_fields
        return self.model_copy(update={"format": format}) if fixed else self


class SequenceClassificationRecipe(TaskRecipe):
    """Classification of texts or pairs of texts."""

    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with the second text of a pair."""
    label: str = "label"
    """Column with the label: an integer from 0, a boolean, or a name."""
    num_labels: Labels | None = None
    """Number of labels. Default: inferred from the data."""
    max_length: Count | None = None
    """Maximum length in tokens. Longer inputs are truncated, and a warning counts them. Default:
    the model's limit."""
    metrics: Annotated[list[ClassificationMetric], Field(min_length=1)] = ["accuracy"]
    """Metrics. Tables and log lines show the first."""


class CausalLMRecipe(TaskRecipe):
    """Causal language modeling of plain texts, chats, prompts with completions, or instructions."""

    format: Literal["text", "messages", "prompt-completion", "instruction"] | None = None
    """Format of a row. Default: the first of messages, prompt-completion, instruction and text
    whose columns exist."""
    text: str = "text"
    """Column with plain text. All tokens have a loss."""
    messages: str = "messages"
    """Column with a list of {role, content}, formatted by the tokenizer's chat template. All tokens
    have a loss."""
    prompt: str = "prompt"
    """Column with the prompt. Its tokens have no loss."""
    completion: str = "completion"
    """Column with the completion. Only its tokens have a loss."""
    instruction: str = "instruction"
    """Column with the instruction, for the template."""
    input: str = "input"
    """Column with the instruction's input, for the template. It may be missing or empty."""
    output: str = "output"
    """Column with the answer. Only its tokens have a loss."""
    template: str = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    """Template of the prompt, with instruction and input as fields in Python's format syntax. A
    paragraph whose only field is empty is omitted."""
    max_length: Count | None = None
    """Maximum length in tokens. Longer examples are truncated, and a warning counts them. Default:
    the model's limit, at most 1024."""
    special_tokens: Literal["text", "tokens"] | None = None
    """Reading of special tokens that are written in texts, prompts and completions, such as </s>:
    as characters, or as tokens, for texts that were rendered with a chat template before. Default:
    such rows are refused. In messages they are characters."""
    max_new_tokens: Count = 32
    """Maximum number of generated tokens, for exact_match and rougeL."""
    metrics: Annotated[list[LanguageMetric], Field(min_length=1)] = ["perplexity"]
    """Metrics. Tables and log lines show the first. exact_match and rougeL generate text
    (slower)."""


class ImageClassificationRecipe(TaskRecipe):
    """Classification of images."""

    image: str = "image"
    """Column with the image: a datasets Image, encoded bytes, or the path of a file."""
    label: str = "label"
    """Column with the label: an integer from 0, a boolean, or a name."""
    num_labels: Labels | None = None
    """Number of labels. Default: inferred from the data."""
    white: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Value of white in images with more than 8 bits per channel, such as 4095 for 12 bits or 1.0
    for fractions. Default: 65535 in 16-bit images with values above 4095; others are refused."""
    metrics: Annotated[list[ClassificationMetric], Field(min_length=1)] = ["accuracy"]
    """Metrics. Tables and log lines show the first."""


TASKS.add(
    "sequence-classification",
    "fedmerge_peft.tasks.sequence_classification:SequenceClassificationTask",
    recipe=SequenceClassificationRecipe,
)
TASKS.add("causal-lm", "fedmerge_peft.tasks.causal_lm:CausalLMTask", recipe=CausalLMRecipe)
TASKS.add(
    "image-classification",
    "fedmerge_peft.tasks.image_classification:ImageClassificationTask",
    recipe=ImageClassificationRecipe,
)

AnyTask = Annotated[TaskRecipe, OneOf(TASKS)]
"""A section of any registered task."""


def compares_texts(metric: str) -> bool:
    """Return True if a metric compares generated texts."""
    return "texts" in METRICS[metric].facts["of"]

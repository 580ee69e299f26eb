"""Sections of a recipe's task, told apart by ``name``: what an example is, and how it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe.registered import NameIn, OneOf
from fedmerge_peft.recipe.section import Section

_ARITHMETIC = "fedmerge_peft.tasks.metrics"
METRICS.add(
    "perplexity",
    f"{_ARITHMETIC}:perplexity",
    about="exp of the mean loss; lower is better.",
    of=("loss",),
    greater_is_better=False,
)
METRICS.add(
    "accuracy",
    f"{_ARITHMETIC}:accuracy",
    about="Share of the classes, or tokens, that are predicted.",
    of=("classes", "tokens"),
)
METRICS.add(
    "f1",
    f"{_ARITHMETIC}:f1",
    about="F1 of each class, averaged with equal weights (macro).",
    of=("classes",),
)
METRICS.add(
    "matthews_correlation",
    f"{_ARITHMETIC}:matthews_correlation",
    about="Correlation of predicted and expected classes, from -1 to 1.",
    of=("classes",),
)
METRICS.add(
    "exact_match",
    f"{_ARITHMETIC}:exact_match",
    about="Share of the generated texts that equal the wanted ones.",
    of=("texts",),
)
METRICS.add(
    "rougeL",
    f"{_ARITHMETIC}:rouge_l",
    about="F-measure of the longest common subsequence of words.",
    of=("texts",),
)

ClassificationMetric = Annotated[str, NameIn(METRICS, of=frozenset({"classes"}))]
LanguageMetric = Annotated[str, NameIn(METRICS, of=frozenset({"tokens", "texts", "loss"}))]


class TaskRecipe(Section):
    """Base of a task's section."""

    name: str = ""
    """Which task."""
    if TYPE_CHECKING:
        metrics: Sequence[str]
        """Metrics to report, the shown one first; each task declares its own field."""

    @property
    def label_column(self) -> str | None:
        """Column with the labels; None for tasks whose examples have none."""
        return getattr(self, "label", None)

    def with_format(self, format: str | None) -> Self:
        """Return a copy that fixes how a row becomes tokens, if this task has a choice."""
        fixed = "format" in type(self).model_fields
        return self.model_copy(update={"format": format}) if fixed else self


class SequenceClassificationRecipe(TaskRecipe):
    """Text, or a pair of texts, to one of several labels."""

    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with a second text, for tasks on pairs of sentences."""
    label: str = "label"
    """Column with the label: an integer from 0, or a name."""
    num_labels: PositiveInt | None = None
    """How many labels there are. Default: told from the data."""
    max_length: PositiveInt | None = None
    """Longest input in tokens; longer ones are cut, with a warning that counts them. Default: what the model takes."""
    metrics: Annotated[list[ClassificationMetric], Field(min_length=1)] = ["accuracy"]
    """Metrics to report; the first one is the one that tables and log lines show."""


class CausalLMRecipe(TaskRecipe):
    """Next-token prediction: plain text, chats, prompt and completion, or instructions."""

    format: Literal["text", "messages", "prompt-completion", "instruction"] | None = None
    """How a row becomes tokens. Default: told from the columns, in the order messages, prompt-completion, instruction, text."""
    text: str = "text"
    """Column with plain text; the loss is on every token."""
    messages: str = "messages"
    """Column with a list of {role, content}, laid out by the tokenizer's chat template; the loss is on every token."""
    prompt: str = "prompt"
    """Column with the prompt; no loss on its tokens."""
    completion: str = "completion"
    """Column with the completion; the loss is on its tokens alone."""
    instruction: str = "instruction"
    """Column with the instruction, for the template."""
    input: str = "input"
    """Column with the instruction's input, for the template; it may be absent or empty."""
    output: str = "output"
    """Column with the wanted answer; the loss is on its tokens alone."""
    template: str = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    """Prompt made from instruction and input, in Python's format syntax. Paragraphs whose only field is empty are left out."""
    max_length: PositiveInt | None = None
    """Longest example in tokens; longer ones are cut, with a warning that counts them. Default: what the model takes, at most 1024."""
    max_new_tokens: PositiveInt = 32
    """How many tokens to generate for exact_match and rougeL."""
    metrics: Annotated[list[LanguageMetric], Field(min_length=1)] = ["perplexity"]
    """Metrics to report, the shown one first. exact_match and rougeL generate text, which takes longer."""


class ImageClassificationRecipe(TaskRecipe):
    """An image to one of several labels."""

    image: str = "image"
    """Column with the image: a datasets Image, encoded bytes, or a file path."""
    label: str = "label"
    """Column with the label: an integer from 0, or a name."""
    num_labels: PositiveInt | None = None
    """How many labels there are. Default: told from the data."""
    metrics: Annotated[list[ClassificationMetric], Field(min_length=1)] = ["accuracy"]
    """Metrics to report; the first one is the one that tables and log lines show."""


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
    """Return whether a metric needs generated texts."""
    return "texts" in METRICS[metric].facts["of"]

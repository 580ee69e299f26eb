"""Sections of the main tasks, and their base class: columns, lengths and metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe import metrics as _  # noqa: F401 (registered before the sections below)
from fedmerge_peft.recipe.generation import GenerationSettings
from fedmerge_peft.recipe.imbalance import ImbalanceSettings
from fedmerge_peft.recipe.registered import NameIn, OneOf
from fedmerge_peft.recipe.section import FOREIGN, Count, Labels, Section
from fedmerge_peft.recipe.usual_columns import IMAGE, LABEL, TEXT, UsualColumns

ClassificationMetric = Annotated[str, NameIn(METRICS, of=frozenset({"classes", "class_scores"}))]
LanguageMetric = Annotated[str, NameIn(METRICS, of=frozenset({"tokens", "texts", "loss"}))]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""Hub id of a small text encoder (``TaskRecipe.small_model``)."""


def _template_text(value: str, info: ValidationInfo) -> str:
    """Return a chat template in Jinja, or the name of one of the tokenizer's templates, unchanged.

    Any other ``value`` is the name of a file; return its text. The recipe then contains the text
    itself, so that a run does not depend on the file. A recipe from an untrusted source may not
    name a file, because exports and messages would contain its content.

    Raises:
        ValueError: The file does not exist, cannot be read, contains no chat template, or has more
            than ``LARGEST_TEMPLATE`` characters; or the recipe comes from an untrusted source.
    """
    if "{" in value or _TEMPLATE_NAME.fullmatch(value):
        return value
    if (info.context or {}).get(FOREIGN):
        raise ValueError(
            "in a run directory or a site's kit, a recipe contains the text of the template and "
            "names no file; write the text instead of the file's name"
        )
    path = Path(value).expanduser()
    try:
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                text = file.read(LARGEST_TEMPLATE + 1)
            if "{" in text and len(text) <= LARGEST_TEMPLATE:
                return text
            raise ValueError(
                f"{value} does not contain a chat template in Jinja of at most "
                f"{LARGEST_TEMPLATE:,} characters; name another file"
            )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{value} cannot be read as text ({error})") from error
    raise ValueError(
        f"{path.absolute()} does not exist or is not a file; name a file with a chat template in "
        "Jinja"
    )


_TEMPLATE_NAME = re.compile(r"\w[\w-]*")
LARGEST_TEMPLATE = 256 * 1024
"""Maximum size of a chat template, in characters."""
ChatTemplate = Annotated[str, AfterValidator(_template_text)]


class TaskRecipe(Section):
    """Base of a task's section."""

    name: str = ""
    """Name of the task."""
    other_names: ClassVar[str] = ""
    """Names of the task in other programs, separated by spaces, for suggestions in errors."""
    small_model: ClassVar[str | None] = None
    """Hub id of a small model, which ``fedmerge init`` suggests."""
    usual_columns: ClassVar[UsualColumns] = {}
    """Columns that ``fedmerge init`` looks for in a table, by key of the section."""
    known_columns: ClassVar[Sequence[str]] = ()
    """Sets of columns; the names in a set are separated by spaces. If a table has all columns of a
    set, the task reads the table without keys in the recipe."""
    if TYPE_CHECKING:
        metrics: Sequence[str]
        """Names of the metrics. Tables show the first. Each task declares this field itself."""

    @model_validator(mode="after")
    def _distinct_columns(self) -> Self:
        """Refuse a column that is read twice, such as the label as the text."""
        seen: dict[str, str] = {}
        for key in (*self.usual_columns, "text_pair", "negative"):
            value = getattr(self, key, None)
            for column in value if isinstance(value, list) else [value] if value else []:
                if column in seen:
                    first = seen[column]
                    both = f"{key} names" if key == first else f"{first} and {key} both name"
                    twice = " twice" if key == first else ""
                    raise ValueError(f"{both} the column {column}{twice}; name another column")
                seen[column] = key
        return self

    @property
    def sequences(self) -> int:
        """Number of token sequences in an example, for estimates of memory."""
        return 1

    @property
    def label_column(self) -> str | None:
        """Column with one class per example; None if examples have no class or several classes.

        The right choice of ``multiple-choice`` is not a class.
        """
        return None

    @property
    def label_limit(self) -> int | None:
        """Largest number of labels that the recipe allows; None if it sets no limit."""
        return None

    @property
    def imbalance(self) -> ImbalanceSettings:
        """Settings of the training loss for labels that differ in frequency."""
        return ImbalanceSettings()

    @property
    def counts_labels(self) -> bool:
        """True if a run counts the labels of each client's training examples."""
        return self.label_column is not None

    @property
    def has_labels(self) -> bool:
        """True if the labels have names. Sites must agree on these names."""
        return self.label_column is not None

    @property
    def has_formats(self) -> bool:
        """True if the task reads several formats of rows. Sites must agree on one format."""
        return "format" in type(self).model_fields

    @property
    def media_column(self) -> str | None:
        """Column with images or audio, or with paths of such files; None for other tasks."""
        return None

    def with_format(self, format: str | None) -> Self:
        """Return a copy with this text format, or the section itself if the task has no formats."""
        return self.model_copy(update={"format": format}) if self.has_formats else self

    def of_one_sequence(self) -> TaskRecipe:
        """Return the section for one completion, if examples of this task have two completions.

        For ``preference``, this is a section of ``causal-lm``. Default: the section itself.
        """
        return self

    def to_predict(self, format: str | None) -> TaskRecipe:
        """Return the section with which the models of a run predict.

        Args:
            format: Text format of the run's data; None if the task has no formats.
        """
        return self

    def to_complete(self) -> CompletionRecipe | None:
        """Return the section by which exported models complete prompts; None if they do not."""
        return None


class ClassificationRecipe(ImbalanceSettings, TaskRecipe):
    """Base of the sections of tasks that predict one of several labels for each example."""

    label: str = "label"
    """Column with the label: an integer from 0, a boolean, or a name."""
    num_labels: Labels | None = None
    """Number of labels. Default: inferred from the data."""
    metrics: Annotated[list[ClassificationMetric], Field(min_length=1)] = ["accuracy"]
    """Metrics. Tables and log lines show the first."""

    @property
    def label_column(self) -> str:
        return self.label

    @property
    def label_limit(self) -> int | None:
        return self.num_labels


class TextSettings(Section):
    """Settings of tasks on a text or a pair of texts."""

    small_model: ClassVar[str | None] = ENCODER

    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with the second text of a pair."""
    max_length: Count | None = None
    """Maximum length in tokens. Longer inputs are truncated, and a warning counts them. Default:
    the model's limit."""


class SequenceClassificationRecipe(TextSettings, ClassificationRecipe):
    """Classification of texts or pairs of texts."""

    other_names: ClassVar[str] = (
        "text-classification sentiment-analysis seq_cls classification sentence-classification"
    )
    usual_columns: ClassVar[UsualColumns] = {"text": TEXT, "label": LABEL}


class CompletionRecipe(GenerationSettings, TaskRecipe):
    """Base of the sections of tasks whose models complete prompts, which are texts or chats."""

    small_model: ClassVar[str | None] = "HuggingFaceTB/SmolLM2-135M-Instruct"

    system_prompt: str | None = None
    """System prompt of chats that do not contain one."""
    chat_template: ChatTemplate | None = None
    """Chat template: Jinja text, a file with Jinja text (a name with a dot or a slash), or the name
    of one of the tokenizer's templates. Default: the tokenizer's template."""
    max_length: Count | None = None
    """Maximum length in tokens. Longer examples are truncated, and a warning counts them. Default:
    the model's limit, at most 1024."""
    special_tokens: Literal["text", "tokens"] | None = None
    """Treatment of special tokens, such as </s>, that occur in texts, prompts and completions.
    text: they are read as characters. tokens: they are read as tokens, for texts that were already
    rendered with a chat template. Default: rows with special tokens are refused. In messages,
    special tokens are always read as characters."""

    def to_complete(self) -> CompletionRecipe:
        return self


class CausalLMRecipe(CompletionRecipe):
    """Causal language modeling of plain texts, chats, prompts with completions, or instructions."""

    other_names: ClassVar[str] = "text-generation language-modeling language-modelling clm lm sft"
    usual_columns: ClassVar[UsualColumns] = {"text": TEXT}
    known_columns: ClassVar[Sequence[str]] = (
        "prompt completion",
        "instruction output",
        "messages",
        "conversations",
    )

    format: Literal["text", "messages", "prompt-completion", "instruction"] | None = None
    """Format of a row. Default: the first of messages, prompt-completion, instruction and text
    whose columns exist."""
    loss: Literal["assistant", "completion", "all"] | None = None
    """Tokens with a loss. assistant: the assistant's messages in chats. completion: the completion
    or, in chats in a single column, the last message. all: all tokens but the first. Default:
    assistant for chats in a single column, completion for rows with a prompt and a completion, all
    for plain text."""
    text: str = "text"
    """Column with plain text."""
    messages: str = "messages"
    """Column with a list of {role, content}, formatted by the chat template. If a table lacks it,
    ShareGPT's column conversations is read, with a list of {from, value}."""
    tools: str = "tools"
    """Column with the tools of a chat, for chat templates with tools: a list of JSON schemas, or
    this list as JSON text. The column may be missing or empty."""
    prompt: str = "prompt"
    """Column with the prompt: a text, or a list of messages."""
    completion: str = "completion"
    """Column with the completion: a text, or a list of messages."""
    instruction: str = "instruction"
    """Column with the instruction, for the template."""
    input: str = "input"
    """Column with the instruction's input, for the template. The column may be missing or empty."""
    output: str = "output"
    """Column with the answer to an instruction, which is the completion."""
    template: str = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    """Template of the prompt in Python's format syntax. Fields are {instruction}, {input} and the
    names of other columns. A paragraph whose only field is empty is omitted."""
    metrics: Annotated[list[LanguageMetric], Field(min_length=1)] = ["perplexity"]
    """Metrics. Tables and log lines show the first. Metrics of generated text, such as rougeL, take
    longer."""

    def to_predict(self, format: str | None) -> Self:
        """Return a copy for the completion of prompts."""
        completing = {"format": "prompt-completion", "metrics": ["exact_match"], "loss": None}
        if format == "messages":  # the chat template writes special tokens into prompts
            completing["special_tokens"] = "tokens"
        return self.model_copy(update=completing)


class ImageSettings(Section):
    """Settings of tasks on images."""

    small_model: ClassVar[str | None] = "google/vit-base-patch16-224-in21k"

    image: str = "image"
    """Column with the image: a datasets Image, encoded bytes, or the path of a file."""
    white: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Value of white in images with more than 8 bits per channel, such as 4095 for 12 bits or 1.0
    for fractions. Default: 65535 for images whose largest value is 0 or an integer from 4096 to
    65535, and 255 for color arrays of integers up to 255; other images with more than 8 bits are
    refused."""

    @property
    def media_column(self) -> str:
        return self.image


class ImageClassificationRecipe(ImageSettings, ClassificationRecipe):
    """Classification of images."""

    other_names: ClassVar[str] = "vision img_cls image_cls"
    usual_columns: ClassVar[UsualColumns] = {
        "image": IMAGE,
        "label": replace(LABEL, optional=True),
    }


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

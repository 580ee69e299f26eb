"""Sections of tasks that predict tags, numbers or sets of labels from texts, and their bases."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe.imbalance import ImbalanceSettings
from fedmerge_peft.recipe.registered import NameIn
from fedmerge_peft.recipe.section import Count
from fedmerge_peft.recipe.tasks import ENCODER, TaskRecipe, TextSettings
from fedmerge_peft.recipe.usual_columns import LABELS, NUMBER, TEXT, UsualColumns, named

TagMetric = Annotated[str, NameIn(METRICS, of=frozenset({"tags", "class_scores"}))]


class TokenClassificationRecipe(ImbalanceSettings, TaskRecipe):
    """Tags of the words of a text, such as named entities."""

    other_names: ClassVar[str] = "ner pos tagging token_cls named-entity-recognition"
    small_model: ClassVar[str | None] = ENCODER
    usual_columns: ClassVar[UsualColumns] = {
        "words": named("tokens words", of="list"),
        "tags": named("ner_tags tags pos_tags chunk_tags", of="list"),
    }

    words: str = "tokens"
    """Column with the words of each text, as a list."""
    tags: str = "ner_tags"
    """Column with the tags of the words, as a list of names or ids. Entities have the tags of IOB2
    (B-PER, I-PER, O) or BIOES."""
    text: str = "text"
    """Column with the text to which `spans` refers."""
    spans: str | None = None
    """Column with the entities of each text, as a list of {start, end, label}. start and end count
    characters from 0; end is the position after the last character of the entity. The column
    replaces `words` and `tags`. Entities may not overlap."""
    max_length: Count | None = None
    """Maximum length in tokens. Words beyond it have no loss and no prediction, and a warning
    states the number of longer texts. Default: the model's limit."""
    metrics: Annotated[list[TagMetric], Field(min_length=1)] = ["entity_f1"]
    """Metrics. Tables and log lines show the first."""

    @property
    def has_labels(self) -> bool:
        return True


TASKS.add(
    "token-classification",
    "fedmerge_peft.tasks.token_classification:TokenClassificationTask",
    recipe=TokenClassificationRecipe,
)


# ---- text-regression -----------------------------------------------------------------------------

ValueMetric = Annotated[str, NameIn(METRICS, of=frozenset({"values"}))]


class RegressionRecipe(TaskRecipe):
    """Base of tasks that predict one number for each example."""

    target: str = "label"
    """Column with the number. The model learns it without scaling; numbers whose magnitude is about
    1 train best."""
    metrics: Annotated[list[ValueMetric], Field(min_length=1)] = ["mse"]
    """Metrics. Tables and log lines show the first."""


class TextRegressionRecipe(TextSettings, RegressionRecipe):
    """A number for each text or pair of texts."""

    other_names: ClassVar[str] = "regression sts stsb"
    usual_columns: ClassVar[UsualColumns] = {"text": TEXT, "target": NUMBER}


TASKS.add(
    "text-regression",
    "fedmerge_peft.tasks.text_regression:TextRegressionTask",
    recipe=TextRegressionRecipe,
)

# ---- multi-label-classification ------------------------------------------------------------------

LabelSetMetric = Annotated[str, NameIn(METRICS, of=frozenset({"label_sets", "label_scores"}))]


class LabelSetRecipe(ImbalanceSettings, TaskRecipe):
    """Base of tasks that predict any number of labels for each example."""

    labels: str | Annotated[list[str], Field(min_length=1)] = "labels"
    """Column with lists of labels, which are names or ids; or a list of columns, one for each
    label, with 0 and 1 or booleans."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Smallest probability at which a label is predicted."""
    metrics: Annotated[list[LabelSetMetric], Field(min_length=1)] = ["micro_f1"]
    """Metrics. Tables and log lines show the first."""

    @property
    def counts_labels(self) -> bool:
        return True

    @property
    def has_labels(self) -> bool:
        return True


class MultiLabelClassificationRecipe(TextSettings, LabelSetRecipe):
    """Any number of labels for each text or pair of texts."""

    other_names: ClassVar[str] = "multilabel multi-label multilabel-classification"
    usual_columns: ClassVar[UsualColumns] = {"text": TEXT, "labels": LABELS}


TASKS.add(
    "multi-label-classification",
    "fedmerge_peft.tasks.multi_label_classification:MultiLabelClassificationTask",
    recipe=MultiLabelClassificationRecipe,
)

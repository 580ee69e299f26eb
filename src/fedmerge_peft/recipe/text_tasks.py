"""Sections of tasks on several texts: source and target, question and context, anchor and positive,
or choices.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe.generation import GenerationSettings
from fedmerge_peft.recipe.registered import NameIn
from fedmerge_peft.recipe.section import Boolean, Count, CountOrZero
from fedmerge_peft.recipe.tasks import ENCODER, LanguageMetric, TaskRecipe
from fedmerge_peft.recipe.usual_columns import UsualColumn, UsualColumns, named

AnswerMetric = Annotated[str, NameIn(METRICS, of=frozenset({"answers"}))]
ChoiceMetric = Annotated[str, NameIn(METRICS, of=frozenset({"classes"}))]
RetrievalMetric = Annotated[str, NameIn(METRICS, of=frozenset({"vectors"}))]


class Seq2SeqLMRecipe(GenerationSettings, TaskRecipe):
    """Generation of a target text from a source text, with an encoder and a decoder."""

    other_names: ClassVar[str] = (
        "seq2seq text2text-generation summarization translation seq_2_seq_lm"
    )
    small_model: ClassVar[str | None] = "google-t5/t5-small"
    usual_columns: ClassVar[UsualColumns] = {
        "source": named("source document article src"),
        "target": named("target summary highlights tgt", of="varied"),
    }

    source: str = "source"
    """Column with the source text."""
    target: str = "target"
    """Column with the target text."""
    prefix: str = ""
    """Text before each source, such as "summarize: "."""
    source_language: str | None = None
    """Language code of the sources, such as en_XX, for multilingual tokenizers."""
    target_language: str | None = None
    """Language code of the targets. Its token begins each generated text."""
    max_source_length: Count | None = None
    """Maximum length in tokens of a source with its prefix. Longer sources are truncated, and a
    warning counts them. Default: the model's limit, at most 1024."""
    max_target_length: Count = 128
    """Maximum length of a target in tokens. Longer targets are truncated, and a warning counts
    them."""
    metrics: Annotated[list[LanguageMetric], Field(min_length=1)] = ["perplexity"]
    """Metrics. Tables and log lines show the first. exact_match, rougeL, chrf and bleu
    require generated text, and take longer."""


class QuestionAnsweringRecipe(TaskRecipe):
    """Extractive question answering: the answer is a part of a context."""

    other_names: ClassVar[str] = "qa squad extractive-qa question_ans"
    small_model: ClassVar[str | None] = ENCODER
    usual_columns: ClassVar[UsualColumns] = {
        "question": named("question"),
        "context": named("context passage paragraph"),
        "answers": named("answers answer"),
    }

    question: str = "question"
    """Column with the question."""
    context: str = "context"
    """Column with the text that contains the answer."""
    answers: Annotated[str, Field(min_length=1)] = "answers"
    """Column with the answers, {text, answer_start}: texts, and the positions of their first
    characters in the context. The model learns the first answer. Metrics compare a prediction with
    the answer that is most similar to it."""
    no_answer: Boolean = False
    """True if the context may contain no answer to a question, as in SQuAD 2."""
    max_length: Count | None = None
    """Maximum length in tokens of question and context together. Longer contexts become several
    windows. Default: the model's limit, at most 384."""
    stride: CountOrZero | None = None
    """Number of tokens that consecutive windows of a context share. Default: 128, at most a third
    of a window."""
    max_answer_length: Count = 30
    """Maximum length in tokens of a predicted answer."""
    metrics: Annotated[list[AnswerMetric], Field(min_length=1)] = ["squad_f1", "squad_exact_match"]
    """Metrics. Tables and log lines show the first."""

    @property
    def texts(self) -> tuple[str, str]:
        """Columns with the question and the context."""
        return self.question, self.context

    def to_predict(self, format: str | None) -> Self:
        """Return a copy for rows without answers."""
        return self.model_copy(update={"answers": ""})


class SentenceEmbeddingRecipe(TaskRecipe):
    """Vectors of texts for search. The vectors of matching texts are similar, and the vectors of
    other texts are dissimilar.
    """

    other_names: ClassVar[str] = "sentence-similarity embedding feature-extraction retrieval"
    small_model: ClassVar[str | None] = ENCODER
    usual_columns: ClassVar[UsualColumns] = {
        "anchor": named("anchor query"),
        "positive": named("positive"),
    }

    anchor: str = "anchor"
    """Column with the text to search with."""
    positive: Annotated[str, Field(min_length=1)] = "positive"
    """Column with a text that matches the anchor. The positives of the other rows in a client's
    batch are negatives."""
    negative: str | None = None
    """Column with a text that does not match the anchor, often a similar text (triplets)."""
    scale: Annotated[float, Field(gt=0, le=1_000)] = 20.0
    """Factor of the cosine similarities in the loss: the inverse of the temperature."""
    max_length: Count | None = None
    """Maximum length in tokens. Longer texts are truncated, and a warning counts them. Default:
    the model's limit."""
    metrics: Annotated[list[RetrievalMetric], Field(min_length=1)] = ["mrr", "recall_at_1"]
    """Metrics. Tables and log lines show the first."""

    @property
    def sequences(self) -> int:
        return len(self.columns)

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the texts by key, without keys that are not set."""
        named = {"anchor": self.anchor, "positive": self.positive, "negative": self.negative}
        return {key: column for key, column in named.items() if column}

    def to_predict(self, format: str | None) -> Self:
        """Return a copy for rows of single texts."""
        return self.model_copy(update={"positive": "", "negative": None})


class MultipleChoiceRecipe(TaskRecipe):
    """Choice of the correct text among several texts that may follow a context."""

    other_names: ClassVar[str] = "mc swag multichoice multiple-choice-qa"
    small_model: ClassVar[str | None] = ENCODER
    usual_columns: ClassVar[UsualColumns] = {
        "context": named("context sent1 ctx premise article question question_stem goal sentence"),
        "choices": UsualColumn("choices", "choices endings options"),
        "start": named("sent2 question", optional=True),
        "label": named("label answer answerkey"),
    }

    context: str = "context"
    """Column with the text that the choices may follow, such as a question."""
    choices: str | Annotated[list[str], Field(min_length=2)] = "choices"
    """Column with lists of texts, or with records {text: [...], label: [...]} of texts and their
    names; or a list of columns, one for each choice. Rows may differ in their number of choices; in
    rows with fewer choices, the last columns are empty."""
    start: str | None = None
    """Column with a text that precedes each choice of a row, such as SWAG's sent2. The text may be
    empty."""
    label: str = "label"
    """Column with the right choice: its number from 0, its letter from A, its name or its text."""
    max_length: Count | None = None
    """Maximum length in tokens of a context with one choice. Longer inputs are truncated, and a
    warning counts them. Default: the model's limit."""
    metrics: Annotated[list[ChoiceMetric], Field(min_length=1)] = ["accuracy"]
    """Metrics. Tables and log lines show the first."""

    @property
    def sequences(self) -> int:
        """Number of choices of an example: of columns, or 4, as in most data sets."""
        return len(self.choices) if isinstance(self.choices, list) else 4

    def to_predict(self, format: str | None) -> Self:
        """Return a copy that reads the inputs of predictions.

        Their columns have the names of this section's keys, such as ``context``.
        """
        own = {key: key for key in ("context", "choices", "label")}
        return self.model_copy(update={**own, "start": self.start and "start"})


TASKS.add(
    "multiple-choice",
    "fedmerge_peft.tasks.multiple_choice:MultipleChoiceTask",
    recipe=MultipleChoiceRecipe,
)
TASKS.add(
    "sentence-embedding",
    "fedmerge_peft.tasks.sentence_embedding:SentenceEmbeddingTask",
    recipe=SentenceEmbeddingRecipe,
)
TASKS.add(
    "question-answering",
    "fedmerge_peft.tasks.question_answering:QuestionAnsweringTask",
    recipe=QuestionAnsweringRecipe,
)
TASKS.add(
    "seq2seq-lm",
    "fedmerge_peft.tasks.seq2seq_lm:Seq2SeqLMTask",
    recipe=Seq2SeqLMRecipe,
)

"""Sections of tasks on pairs of texts: source and target."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe.generation import GenerationSettings
from fedmerge_peft.recipe.section import Count
from fedmerge_peft.recipe.tasks import LanguageMetric, TaskRecipe

_TEXTS = "fedmerge_peft.tasks.text_metrics"
METRICS.add(
    "bleu",
    f"{_TEXTS}:bleu",
    about="BLEU of all generated texts, by sacrebleu.",
    of=("texts",),
    range=(0.0, 1.0),
)
METRICS.add(
    "chrf",
    f"{_TEXTS}:chrf",
    about="chrF of all generated texts, the F-score of character n-grams, by sacrebleu.",
    of=("texts",),
    range=(0.0, 1.0),
)


class Seq2SeqLMRecipe(GenerationSettings, TaskRecipe):
    """Generation of a target text from a source text, with an encoder and a decoder."""

    source: str = "source"
    """Column with the source text."""
    target: str = "target"
    """Column with the target text."""
    prefix: str = ""
    """Text before each source, such as "summarize: "."""
    source_language: str | None = None
    """Language code of the sources, for tokenizers of many languages, such as en_XX."""
    target_language: str | None = None
    """Language code of the targets, with which generated texts begin."""
    max_source_length: Count | None = None
    """Maximum length of a source in tokens. Longer sources are truncated, and a warning counts
    them. Default: the model's limit, at most 1024."""
    max_target_length: Count = 128
    """Maximum length of a target in tokens. Longer targets are truncated, and a warning counts
    them."""
    metrics: Annotated[list[LanguageMetric], Field(min_length=1)] = ["perplexity"]
    """Metrics. Tables and log lines show the first. exact_match, rougeL, chrf and bleu generate
    text (slower)."""


TASKS.add(
    "seq2seq-lm",
    "fedmerge_peft.tasks.seq2seq_lm:Seq2SeqLMTask",
    recipe=Seq2SeqLMRecipe,
)

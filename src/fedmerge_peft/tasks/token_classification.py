"""Classification of the words of a text, such as the recognition of named entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.plugins import METRICS
from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.tasks.calibration import class_scores
from fedmerge_peft.tasks.encoder import EncoderTask, loading_code
from fedmerge_peft.tasks.entity_metrics import continues_nothing, is_entity_tag
from fedmerge_peft.tasks.imbalance import WeightedClasses
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.spans import SpanTags
from fedmerge_peft.tasks.tagged_words import ListedTags, TagSource, first_tokens
from fedmerge_peft.tasks.tokenization import pad, ragged

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.label_tasks import TokenClassificationRecipe

_IGNORED = -100


class TokenClassificationTask(WeightedClasses, EncoderTask):
    """Tagging of words. The first token of a word has the word's tag; other tokens have no loss.

    Lists of words are joined with spaces, because pipelines read texts. Arguments are those of
    ``EncoderTask``.
    """

    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    per_token: ClassVar[bool] = True
    pipeline: ClassVar[str] = "token-classification"
    loading_code: ClassVar[str] = loading_code("AutoModelForTokenClassification")

    @classmethod
    def output_names(cls, recipe: TokenClassificationRecipe, table: Dataset) -> list[str]:
        source = tag_source(recipe)
        labels = source.infer_tags(table)
        scored = [name for name in recipe.metrics if METRICS[name].facts.get("entities")]
        others = [label for label in labels if not is_entity_tag(label)]
        if scored and others:
            raise DataError(
                f"task.metrics: {scored[0]} needs the tags of IOB2 or BIOES, such as B-PER and O; "
                f"column {source.column!r} has {others[0]!r}; use task.metrics=[tag_accuracy], or "
                "store the names of the tags"
            )
        return labels

    @classmethod
    def labels_in(cls, recipe: TokenClassificationRecipe, table: Dataset) -> list[str]:
        return cls.output_names(recipe, table)

    @classmethod
    def relabel(
        cls, recipe: TokenClassificationRecipe, table: Dataset, labels: Sequence[str]
    ) -> Dataset:
        return tag_source(recipe).relabel(table, labels)

    @classmethod
    def blanks(
        cls, recipe: TokenClassificationRecipe, labels: Sequence[str]
    ) -> dict[str, tuple[Any, Any]]:
        source = tag_source(recipe)
        return {source.column: source.blank(labels)}

    @classmethod
    def check_table(cls, recipe: TokenClassificationRecipe, table: Dataset) -> None:
        tag_source(recipe).read(table, cls.output_names(recipe, table))

    @classmethod
    def probe_inputs(cls, recipe: TokenClassificationRecipe) -> list[Any]:
        return list(tag_source(recipe).probes)

    @classmethod
    def input_table(
        cls, recipe: TokenClassificationRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        return tag_source(recipe).input_table(labels, inputs)

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row.

        ``Examples.cuts`` lists rows with truncated texts, dropped words, or inconsistent tags.

        Raises:
            DataError: The columns do not match the recipe; the tokenizer fails on a text, or reads
                a part of it as a special token; no word of a row has tokens; a text has tokens that
                the model does not have.
            BackboneError: The tokenizer does not return character offsets.
        """
        if not getattr(self.processor, "is_fast", False):
            raise BackboneError(
                "token-classification needs a tokenizer that returns the places of its tokens in a "
                "text; use a fast tokenizer of transformers (backbone.tokenizer, or tokenizer=... "
                "for a model in memory)"
            )
        rows = tag_source(self.recipe).read(table, self.labels)
        tokens, truncated = self.tokenize([[row.text for row in rows]], offsets=True)
        labels, places, lost, broken = [], [], [], []
        cut = set(truncated)
        for row, offsets in enumerate(tokens.pop("offset_mapping")):
            own_tags = rows[row].tags
            first = first_tokens(rows[row].bounds, offsets)
            known = np.flatnonzero(first >= 0)
            if not len(known):
                raise DataError(
                    f"{row_name(row)}: no word has tokens: {rows[row].text[:50]!r}; remove it"
                )
            if len(known) < len(first) and row not in cut:
                lost.append(row)
            if continues_nothing([self.labels[tag] for tag in own_tags]):
                broken.append(row)
            own = np.full(len(offsets), _IGNORED)
            own[first[known]] = np.array(own_tags)[known]
            labels.append(own.tolist())
            places.append(first.tolist())
        self.check_ids(tokens["input_ids"])
        columns = {name: ragged(values) for name, values in tokens.items()}
        bounds = [torch.from_numpy(row.bounds) for row in rows]
        return Examples(
            {**columns, "labels": ragged(labels), "places": ragged(places), "bounds": bounds},
            {
                f"are longer than {self.max_length} tokens and were truncated": truncated,
                "have words that the tokenizer drops, and that metrics leave out": lost,
                "have a tag such as I-PER after O, which metrics read as a new entity": broken,
            },
        )

    def named(self, target: Tensor) -> str:
        return " ".join(self._names(target[target != _IGNORED]))

    def stack_labels(self, labels: Sequence[Tensor], side: Literal["left", "right"]) -> Tensor:
        return pad(labels, _IGNORED, side)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropy ``-log softmax(logits)[label]`` over the words of an example.

        Args:
            logits: ``(batch, length, tags)``.
            labels: ``(batch, length)``; -100 marks tokens without a tag.

        Returns:
            Sum in nats and number of words, both float32 ``(batch,)``.
        """
        losses = self.term_losses(logits, labels)
        return losses.sum(dim=1), (labels != _IGNORED).sum(dim=1).float()

    def term_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        ).view_as(labels)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return predicted and expected tags of each example, for words that have tokens.

        If a metric needs them, also return the probabilities of the tags (``class_scores``).
        """
        own = labels != _IGNORED
        classes = logits.argmax(dim=-1)
        predicted = [self._names(ids[inside]) for ids, inside in zip(classes, own, strict=True)]
        expected = [self._names(ids[inside]) for ids, inside in zip(labels, own, strict=True)]
        return {
            "tags": (predicted, expected),
            **class_scores(self.metrics, logits[own], labels[own]),
        }

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the predicted tags of words, or the predicted spans, with their probabilities."""
        scores, ids = torch.softmax(logits, dim=-1).max(dim=-1)
        source = tag_source(self.recipe)
        answers = []
        for row, index in enumerate(indices):
            size = len(examples.columns["input_ids"][index])
            shift = logits.shape[1] - size if self.padding == "left" else 0
            places = [place + shift if place >= 0 else None
                      for place in examples.columns["places"][index].tolist()]  # fmt: skip
            tags = [None if p is None else self.labels[int(ids[row, p])] for p in places]
            own = [None if p is None else float(scores[row, p]) for p in places]
            answers.append(source.answer(examples.columns["bounds"][index].numpy(), tags, own))
        return answers

    def _names(self, ids: Tensor) -> list[str]:
        return [self.labels[label] for label in ids.tolist()]


def tag_source(recipe: TokenClassificationRecipe) -> TagSource:
    """Return the reader of the recipe's columns: words and tags, or texts and spans."""
    return ListedTags(recipe) if recipe.spans is None else SpanTags(recipe)

"""Classification of the words of a text, such as named entities."""

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
from fedmerge_peft.tasks.base import Compared, Examples, reject_inputs
from fedmerge_peft.tasks.encoder import EncoderTask, loading_code
from fedmerge_peft.tasks.entity_metrics import continues_nothing, is_entity_tag
from fedmerge_peft.tasks.labels import blank_table
from fedmerge_peft.tasks.lists import infer_list_labels, relabel_lists
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.tagged_words import first_tokens, read_words
from fedmerge_peft.tasks.tokenization import pad, ragged
from fedmerge_peft.tasks.vocabulary import reject_unknown_ids, warn_of_unknown

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.label_tasks import TokenClassificationRecipe

_IGNORED = -100


class TokenClassificationTask(EncoderTask):
    """Tags of words. The first token of a word has its tag; other tokens have no loss.

    Words are joined with spaces, as pipelines read a text. ``EncoderTask`` has the arguments.
    """

    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    per_token: ClassVar[bool] = True
    pipeline: ClassVar[str] = "token-classification"
    loading_code: ClassVar[str] = loading_code("AutoModelForTokenClassification")

    @classmethod
    def output_names(cls, recipe: TokenClassificationRecipe, table: Dataset) -> list[str]:
        labels = infer_list_labels(table, recipe.tags, "task.tags")
        scored = [name for name in recipe.metrics if METRICS[name].facts.get("entities")]
        others = [label for label in labels if not is_entity_tag(label)]
        if scored and others:
            raise DataError(
                f"task.metrics: {scored[0]} needs the tags of IOB2 or BIOES, such as B-PER and O; "
                f"column {recipe.tags!r} has {others[0]!r}; use task.metrics=[tag_accuracy], or "
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
        return relabel_lists(table, recipe.tags, "task.tags", labels)

    @classmethod
    def blanks(
        cls, recipe: TokenClassificationRecipe, labels: Sequence[str]
    ) -> dict[str, tuple[Any, Any]]:
        from datasets import ClassLabel, List

        return {recipe.tags: (List(ClassLabel(names=list(labels))), [])}

    @classmethod
    def check_table(cls, recipe: TokenClassificationRecipe, table: Dataset) -> None:
        read_words(recipe, table, cls.output_names(recipe, table))

    @classmethod
    def probe_inputs(cls, recipe: TokenClassificationRecipe) -> list[Any]:
        return [["a"], ["another", "text,", "which", "is", "longer"]]

    @classmethod
    def input_table(
        cls, recipe: TokenClassificationRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        from datasets import List, Value

        unfit = [
            each
            for each in inputs
            if not isinstance(each, list | tuple) or not all(isinstance(word, str) for word in each)
        ]
        reject_inputs(unfit, "a list of words")
        tag = labels.index("O") if "O" in labels else 0
        types = {
            recipe.words: List(Value("string")),
            recipe.tags: cls.blanks(recipe, labels)[recipe.tags][0],
        }
        return blank_table(types, [[list(words), [tag] * len(words)] for words in inputs], {})

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row. ``Examples.cuts`` has texts and words that were cut.

        Raises:
            DataError: A column does not exist, or is not one of lists; words and tags of a row
                differ in number; no word of a row has tokens; a tag is unknown.
            BackboneError: The tokenizer does not return the places of its tokens.
        """
        if not getattr(self.processor, "is_fast", False):
            raise BackboneError(
                "token-classification needs a tokenizer that returns the places of its tokens (a "
                "fast one of transformers); name another in backbone.tokenizer"
            )
        words, tags = read_words(self.recipe, table, self.labels)
        tokens, truncated = self.tokenize([[" ".join(row) for row in words]], offsets=True)
        labels, places, lost, broken = [], [], [], []
        cut = set(truncated)
        for row, offsets in enumerate(tokens.pop("offset_mapping")):
            first = first_tokens(words[row], offsets)
            known = np.flatnonzero(first >= 0)
            if not len(known):
                raise DataError(
                    f"row {row} (of the rows in use): no word in column {self.recipe.words!r} has "
                    f"tokens: {words[row][:5]}; remove the row"
                )
            if len(known) < len(first) and row not in cut:
                lost.append(row)
            if continues_nothing([self.labels[tag] for tag in tags[row]]):
                broken.append(row)
            own = np.full(len(offsets), _IGNORED)
            own[first[known]] = np.array(tags[row])[known]
            labels.append(own.tolist())
            places.append(first.tolist())
        reject_unknown_ids(tokens["input_ids"], self._vocabulary)
        warn_of_unknown(tokens["input_ids"], self.processor)
        columns = {name: ragged(rows) for name, rows in tokens.items()}
        return Examples(
            {**columns, "labels": ragged(labels), "places": ragged(places)},
            {
                f"are longer than {self.max_length} tokens and were truncated": truncated,
                "have words that the tokenizer drops, which have no tag in scores": lost,
                "have a tag such as I-PER after O, which begins an entity in scores": broken,
            },
        )

    def show(self, table: Dataset) -> list[ShownExample]:
        examples = self.encode(table)
        rows = zip(examples.columns["input_ids"], examples.columns["labels"], strict=True)
        return [
            ShownExample(
                [Segment("text", [self.processor.decode([token]) for token in ids.tolist()])],
                " ".join(self._names(labels[labels != _IGNORED])),
            )
            for ids, labels in rows
        ]

    def stack_labels(self, labels: Sequence[Tensor], side: Literal["left", "right"]) -> Tensor:
        return pad(labels, _IGNORED, side)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropy ``-log softmax(logits)[label]`` over the words of an example.

        Args:
            logits: ``(batch, length, tags)``.
            labels: ``(batch, length)``; -100 marks tokens that begin no word.

        Returns:
            Sum in nats and number of words, both float32 ``(batch,)``.
        """
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        ).view_as(labels)
        return losses.sum(dim=1), (labels != _IGNORED).sum(dim=1).float()

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return predicted and expected tags of each example, for words with a label."""
        own = labels != _IGNORED
        found = logits.argmax(dim=-1)
        predicted = [self._names(ids[inside]) for ids, inside in zip(found, own, strict=True)]
        expected = [self._names(ids[inside]) for ids, inside in zip(labels, own, strict=True)]
        return {"tags": (predicted, expected)}

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the most likely tag of each word, and its probability; None without tokens."""
        scores, ids = torch.softmax(logits, dim=-1).max(dim=-1)
        answers = []
        for row, index in enumerate(indices):
            size = len(examples.columns["input_ids"][index])
            shift = logits.shape[1] - size if self.padding == "left" else 0
            places = [place + shift if place >= 0 else None
                      for place in examples.columns["places"][index].tolist()]  # fmt: skip
            answers.append(
                {
                    "tags": [None if p is None else self.labels[int(ids[row, p])] for p in places],
                    "scores": [None if p is None else float(scores[row, p]) for p in places],
                }
            )
        return answers

    def _names(self, ids: Tensor) -> list[str]:
        return [self.labels[label] for label in ids.tolist()]

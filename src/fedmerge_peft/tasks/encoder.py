"""Base of tasks that read tokens and add a head to the model: tokenizer, length, padding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Batch, Examples
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.token_task import TokenTask
from fedmerge_peft.tasks.tokenization import (
    more_tokens,
    pad,
    pad_tokens,
    ragged,
    resolve_max_length,
    token_limit,
    truncated,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe

_LOADING = """{{imports}}from peft import PeftModel
from transformers import {auto}, AutoTokenizer

labels = {{labels}}
base = {auto}.from_pretrained(
    {{base}}, num_labels=len(labels), id2label=dict(enumerate(labels)),{further} {{options}}
)
tokenizer = AutoTokenizer.from_pretrained({{processor}})
pad = tokenizer.pad_token_id
base.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
{{load}}
"""


def loading_code(auto: str, problem_type: str | None = None) -> str:
    """Return ``Task.loading_code`` of a model for texts with a head for labels or numbers.

    Args:
        auto: Transformers class of the model.
        problem_type: Name of the loss in the model's configuration; None if there is none.
    """
    further = "" if problem_type is None else f'\n    problem_type="{problem_type}",'
    return _LOADING.format(auto=auto, further=further)


class EncoderTask(TokenTask):
    """Task that adds a head to the model, and reads at most ``max_length`` tokens at a time.

    Without ``max_length`` in the recipe, the model's limit applies.

    Args:
        recipe: Columns, labels, length and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation, from which the labels are inferred.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: The labels do not match the recipe; ``max_length`` exceeds the model's limit, or
            leaves no room for texts.
        BackboneError: The tokenizer or the model's configuration cannot be loaded.
    """

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")

    def __init__(
        self, recipe: Any, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        self.labels = self.output_names(recipe, table)
        config = self.prepare_tokens(recipe, backbone, model_folder)
        limit = token_limit(self.processor, config)
        self.max_length = resolve_max_length(recipe.max_length, limit)
        special = self.processor.num_special_tokens_to_add(self.reads_pairs)
        if self.max_length is not None and self.max_length <= special:
            raise DataError(
                f"task.max_length: a length of {self.max_length} leaves no room for texts, because "
                f"the tokenizer adds {special} special token{'s' * (special != 1)}; "
                + more_tokens(special, limit)
            )
        self._columns = ["input_ids"]
        # RoBERTa has one token type, but its tokenizers may return two.
        self._types = getattr(config, "type_vocab_size", None)
        if (self._types or 0) > 1 and self._returns_types:
            self._columns.append("token_type_ids")

    @property
    def reads_pairs(self) -> bool:
        """True if the model reads pairs of texts; False if it reads single texts."""
        return False

    @property
    def _returns_types(self) -> bool:
        return "token_type_ids" in self.processor.model_input_names

    @classmethod
    @abstractmethod
    def output_names(cls, recipe: Any, table: Dataset) -> list[str]:
        """Return the names of the head's outputs. Raises ``DataError`` for unsuitable columns."""

    def reads_end(self, model: Any) -> bool:
        return bool(getattr(model.config, "is_encoder_decoder", False))

    def match_inputs(self, model: Any) -> None:
        """Check the tokenizer against the model, and test if the model reads token types.

        Some models, such as GPT-2, embed token types with the embeddings of words. The test
        therefore requires that token types of 0 do not change the output. It is omitted if the
        configuration states the number of types, or the tokenizer returns no types.
        """
        super().match_inputs(model)
        if self._types is not None or not self._returns_types:
            return
        ids = torch.tensor(
            [self.processor("a")["input_ids"]], device=next(model.parameters()).device
        )
        with torch.no_grad():
            try:
                without = model(input_ids=ids).logits
                with_zeros = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
            except Exception:  # the model rejects token types; later trials report other causes
                return
        if torch.allclose(without, with_zeros, rtol=1e-3, atol=1e-5):
            self._columns.append("token_type_ids")

    def tokenize(
        self, texts: Sequence[Sequence[str]], *, offsets: bool = False
    ) -> tuple[dict[str, list[list[Any]]], list[int]]:
        """Tokenize texts; return the columns that the model reads, and indices of truncated rows.

        Args:
            texts: Texts, or first and second texts of pairs.
            offsets: Return ``offset_mapping``, too: begin and end of each token in its text.

        Raises:
            DataError: The tokenizer fails on a text, or reads a part of it as a special token.
        """
        options: dict[str, Any] = {"return_offsets_mapping": True} if offsets else {}
        rows, long = truncated(self.processor, *texts, max_length=self.max_length, **options)
        names = [*self._columns, *(["offset_mapping"] if offsets else [])]
        return {name: rows.get(name, []) for name in names}, long

    def probe(self) -> Examples:
        texts = ["a short text", "another text, which is longer than the first one"]
        pairs = [texts, texts] if self.reads_pairs else [texts]
        tokens, _ = self.tokenize(pairs)
        ids = tokens["input_ids"]
        inner = slice(1, -1)  # special tokens keep their places
        mirrored = [*ids[1][:1], *ids[1][inner][::-1], *ids[1][1:][-1:]]
        columns = {name: ragged([*rows, rows[1]]) for name, rows in tokens.items()}
        columns["input_ids"] = ragged([*ids, mirrored])
        labels = [
            torch.zeros_like(row if self.per_token else row[0]) for row in columns["input_ids"]
        ]
        return Examples({**columns, "labels": labels})

    def named(self, target: Tensor) -> str:
        """Return the label of one example as text, for ``fedmerge data --show``."""
        return str(target.tolist())

    def show(self, table: Dataset) -> list[ShownExample]:
        columns = self.encode(table).columns
        return [
            ShownExample([Segment.of(self.processor, "text", ids)], self.named(label))
            for ids, label in zip(columns["input_ids"], columns["labels"], strict=True)
        ]

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack examples.

        Returns:
            ``input_ids``, ``attention_mask`` and, if the model has token types, ``token_type_ids``,
            all ``(batch, longest)``, and ``labels``.
        """
        rows = {
            name: [column[index] for index in indices] for name, column in examples.columns.items()
        }
        side: Literal["left", "right"] = "left" if self.padding == "left" else "right"
        batch = pad_tokens(rows["input_ids"], self.pad_token_id, side)
        batch["labels"] = self.stack_labels(rows["labels"], side)
        if "token_type_ids" in rows:
            type_of_padding = self.processor.pad_token_type_id
            batch["token_type_ids"] = pad(rows["token_type_ids"], type_of_padding, side)
        return batch

    def stack_labels(self, labels: Sequence[Tensor], side: Literal["left", "right"]) -> Tensor:
        """Stack the labels of examples. The default requires labels of equal shape."""
        return torch.stack(list(labels))

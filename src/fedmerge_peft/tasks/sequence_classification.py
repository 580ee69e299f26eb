"""Text, or a pair of texts, to one of several labels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Batch, Examples
from fedmerge_peft.tasks.classification import Classification, encode_labels, infer_labels
from fedmerge_peft.tasks.tokenization import (
    chunks,
    get_pad_token_id,
    load_tokenizer,
    pad,
    ragged,
    read_texts,
    resolve_max_length,
    token_limit,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import BackboneRecipe, SequenceClassificationRecipe

logger = logging.getLogger(__name__)


class SequenceClassificationTask(Classification):
    """Texts cut to what the model takes, padded on the right to the longest of the batch.

    Args:
        recipe: Columns, labels, length and metrics.
        backbone: Where the tokenizer is.
        table: All rows of the federation, from which the labels are told.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: For labels that are not what the recipe says, or a ``max_length`` that the model does not take.
        BackboneError: Where the tokenizer or the model's configuration cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    def __init__(
        self,
        recipe: SequenceClassificationRecipe,
        backbone: BackboneRecipe,
        table: Dataset,
        model_folder: str,
    ) -> None:
        self.recipe = recipe
        self.metrics = recipe.metrics
        self.labels = infer_labels(table, recipe.label, recipe.num_labels)
        self.processor, config = load_tokenizer(backbone, model_folder)
        self.pad_token_id = get_pad_token_id(self.processor)
        self.max_length = resolve_max_length(recipe.max_length, token_limit(self.processor, config))
        # Some tokenizers give token types to models that have none, and GPT-2 would add them up as if they were words.
        typed = (
            getattr(config, "type_vocab_size", None) or 0
        ) > 1 and "token_type_ids" in self.processor.model_input_names
        self._columns = ["input_ids", *(["token_type_ids"] if typed else [])]

    def encode(self, table: Dataset) -> Examples:
        """Tokenise every row; a warning counts the texts that were cut.

        Raises:
            DataError: For a missing column, a null, a column that is no text, or a text that gives no token at all.
        """
        labels = encode_labels(table, self.recipe.label, self.labels)
        texts = [read_texts(table, self.recipe.text, "task.text")]
        if self.recipe.text_pair is not None:
            texts.append(read_texts(table, self.recipe.text_pair, "task.text_pair"))
        tokens: dict[str, list[list[int]]] = {name: [] for name in self._columns}
        cut = 0
        for chunk in chunks(*texts):
            encoded = self.processor(*chunk, verbose=False)
            for row, ids in enumerate(encoded["input_ids"]):
                short = {name: encoded[name][row] for name in self._columns}
                if self.max_length is not None and len(ids) > self.max_length:
                    short = self.processor(
                        *(column[row] for column in chunk),
                        truncation=True,
                        max_length=self.max_length,
                    )
                    cut += 1
                for name in self._columns:
                    tokens[name].append(short[name])
        empty = next((row for row, ids in enumerate(tokens["input_ids"]) if not ids), None)
        if empty is not None:
            raise DataError(
                f"row {empty} in use: the text in column {self.recipe.text!r} gives no token: {texts[0][empty]!r}"
            )
        if cut:
            logger.warning(
                "%d of %d texts are longer than %d tokens and were cut",
                cut,
                len(table),
                self.max_length,
            )
        return Examples(
            {
                **{name: ragged(rows) for name, rows in tokens.items()},
                "labels": list(labels.unbind()),
            }
        )

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """``input_ids``, ``attention_mask`` and, where the model has them, ``token_type_ids``, all ``(batch, longest)``; ``labels``."""
        rows = {
            name: [column[index] for index in indices] for name, column in examples.columns.items()
        }
        batch = {
            "input_ids": pad(rows["input_ids"], self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in rows["input_ids"]], 0),
            "labels": torch.stack(rows["labels"]),
        }
        if "token_type_ids" in rows:
            batch["token_type_ids"] = pad(rows["token_type_ids"], self.processor.pad_token_type_id)
        return batch

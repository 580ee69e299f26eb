"""Classification of texts and pairs of texts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Batch, Examples, reject_inputs
from fedmerge_peft.tasks.classification import (
    Classification,
    encode_labels,
    infer_labels,
    labeled_table,
)
from fedmerge_peft.tasks.tokenization import (
    chunks,
    get_pad_token_id,
    load_tokenizer,
    pad,
    pipeline_tokenizer,
    ragged,
    read_texts,
    resolve_max_length,
    token_limit,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import BackboneRecipe
    from fedmerge_peft.recipe.tasks import SequenceClassificationRecipe

logger = logging.getLogger(__name__)


class SequenceClassificationTask(Classification):
    """Classification of texts, truncated to the model's limit and padded on the right.

    Args:
        recipe: Columns, labels, length and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation, from which the labels are inferred.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: The labels do not match the recipe, or ``max_length`` exceeds the model's limit.
        BackboneError: The tokenizer or the model's configuration cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    reads_last_token: ClassVar[bool] = True
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

labels = {labels}
base = AutoModelForSequenceClassification.from_pretrained(
    {base}, num_labels=len(labels), id2label=dict(enumerate(labels)), {options}
)
tokenizer = AutoTokenizer.from_pretrained({processor})
pad = tokenizer.pad_token_id
base.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
{load}
"""

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
        # Some tokenizers return token types for models without token types. GPT-2 would add their
        # word embeddings.
        has_token_types = (getattr(config, "type_vocab_size", None) or 0) > 1
        has_token_types &= "token_type_ids" in self.processor.model_input_names
        self._columns = ["input_ids", *(["token_type_ids"] if has_token_types else [])]

    @classmethod
    def probe_inputs(cls, recipe: SequenceClassificationRecipe) -> list[Any]:
        texts = ["a", "another text, which is longer"]
        return texts if recipe.text_pair is None else [(text, text) for text in texts]

    @classmethod
    def input_table(
        cls, recipe: SequenceClassificationRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        from datasets import Value

        columns = [name for name in (recipe.text, recipe.text_pair) if name is not None]
        pairs = len(columns) == 2
        rows = [
            list(each) if pairs and isinstance(each, tuple | list) else [each] for each in inputs
        ]
        unfit = [
            row if pairs else row[0]
            for row in rows
            if len(row) != len(columns) or not all(isinstance(text, str) for text in row)
        ]
        reject_inputs(unfit, "a pair of texts" if pairs else "a text")
        texts = {name: Value("string") for name in columns}
        return labeled_table(texts, rows, recipe.label, labels)

    @classmethod
    def pipeline_options(
        cls, recipe: SequenceClassificationRecipe, backbone: BackboneRecipe, folder: str
    ) -> dict[str, Any]:
        tokenizer = pipeline_tokenizer(backbone, folder, recipe.max_length)
        return {"tokenizer": tokenizer, "truncation": True}

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row. A warning counts truncated texts.

        Raises:
            DataError: A column does not exist, has nulls, or is not text; a text has no tokens; a
                label is unknown.
        """
        labels = encode_labels(table, self.recipe.label, self.labels)
        texts = [read_texts(table, self.recipe.text, "task.text")]
        if self.recipe.text_pair is not None:
            texts.append(read_texts(table, self.recipe.text_pair, "task.text_pair"))
        tokens: dict[str, list[list[int]]] = {name: [] for name in self._columns}
        truncated = 0
        for chunk in chunks(*texts):
            encoded = self.processor(*chunk, verbose=False)
            for row, ids in enumerate(encoded["input_ids"]):
                columns = {name: encoded[name][row] for name in self._columns}
                if self.max_length is not None and len(ids) > self.max_length:
                    columns = self.processor(
                        *(column[row] for column in chunk),
                        truncation=True,
                        max_length=self.max_length,
                    )
                    truncated += 1
                for name in self._columns:
                    tokens[name].append(columns[name])
        empty = next((row for row, ids in enumerate(tokens["input_ids"]) if not ids), None)
        if empty is not None:
            raise DataError(
                f"row {empty} (of the rows in use): the text in column {self.recipe.text!r} has no "
                f"tokens: {texts[0][empty]!r}"
            )
        if truncated:
            logger.warning(
                "%d of %d texts are longer than %d tokens and were truncated",
                truncated,
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
        """Pad and stack examples.

        Returns:
            ``input_ids``, ``attention_mask`` and, if the model has token types, ``token_type_ids``,
            all ``(batch, longest)``, and ``labels`` ``(batch,)``.
        """
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

"""Classification of texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from numpy.typing import NDArray

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Batch, Examples, reject_inputs
from fedmerge_peft.tasks.classification import Classification
from fedmerge_peft.tasks.labels import (
    encode_labels,
    infer_labels,
    labeled_table,
)
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.tokenization import (
    get_pad_token_id,
    load_tokenizer,
    pad,
    pad_tokens,
    pipeline_tokenizer,
    ragged,
    read_texts,
    reject_empty,
    resolve_max_length,
    token_limit,
    truncated,
)
from fedmerge_peft.tasks.vocabulary import check_vocabulary, reject_unknown_ids, warn_of_unknown

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import BackboneRecipe
    from fedmerge_peft.recipe.tasks import SequenceClassificationRecipe


class SequenceClassificationTask(Classification):
    """Classification of texts, truncated to the model's limit.

    Special tokens that are written in a text, such as ``</s>``, are characters like all others.

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
        self._model = backbone.model
        self.processor, config = load_tokenizer(backbone, model_folder)
        self.processor.split_special_tokens = True
        self.pad_token_id = get_pad_token_id(self.processor)
        self.max_length = resolve_max_length(recipe.max_length, token_limit(self.processor, config))
        special = self.processor.num_special_tokens_to_add(recipe.text_pair is not None)
        if self.max_length is not None and self.max_length <= special:
            raise DataError(
                f"task.max_length: {self.max_length} tokens leave no room for texts, because the "
                f"tokenizer adds {special}; raise task.max_length"
            )
        self._vocabulary: int | None = None
        self._columns = ["input_ids"]
        # RoBERTa has one type of tokens, but its tokenizers may return two.
        self._types = getattr(config, "type_vocab_size", None)
        if (self._types or 0) > 1 and self._returns_types:
            self._columns.append("token_type_ids")

    @property
    def _returns_types(self) -> bool:
        return "token_type_ids" in self.processor.model_input_names

    @classmethod
    def check_table(cls, recipe: SequenceClassificationRecipe, table: Dataset) -> None:
        read_texts(table, recipe.text, "task.text")
        if recipe.text_pair is not None:
            read_texts(table, recipe.text_pair, "task.text_pair")
        encode_labels(table, recipe.label, infer_labels(table, recipe.label, recipe.num_labels))

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
        tokenizer.split_special_tokens = True
        return {"tokenizer": tokenizer, "truncation": True}

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row. ``Examples.cuts`` has truncated and empty ones.

        Raises:
            DataError: A column does not exist, has nulls, or is not text; a text has no tokens; a
                label is unknown.
        """
        labels = encode_labels(table, self.recipe.label, self.labels)
        texts = [read_texts(table, self.recipe.text, "task.text")]
        if self.recipe.text_pair is not None:
            texts.append(read_texts(table, self.recipe.text_pair, "task.text_pair"))
        tokens, long = self._tokenize(texts)
        reject_empty(tokens["input_ids"], texts[0], self.recipe.text)
        reject_unknown_ids(tokens["input_ids"], self._vocabulary)
        warn_of_unknown(tokens["input_ids"], self.processor)
        return Examples(
            {
                **{name: ragged(rows) for name, rows in tokens.items()},
                "labels": list(labels.unbind()),
            },
            {
                f"are longer than {self.max_length} tokens and were truncated": long,
                "have an empty text": [
                    row
                    for row, parts in enumerate(zip(*texts, strict=True))
                    if not any(part.strip() for part in parts)
                ],
            },
        )

    def show(self, table: Dataset) -> list[ShownExample]:
        examples = self.encode(table)
        rows = zip(examples.columns["input_ids"], examples.columns["labels"], strict=True)
        return [
            ShownExample(
                [Segment("text", [self.processor.decode([token]) for token in ids.tolist()])],
                self.labels[int(label)] if label >= 0 else None,
            )
            for ids, label in rows
        ]

    def _tokenize(
        self, texts: Sequence[Sequence[str]]
    ) -> tuple[dict[str, list[list[int]]], list[int]]:
        """Tokenize columns of texts; return the model's columns and the truncated rows.

        Raises:
            DataError: The tokenizer fails on a text, or takes a part of it for a special token.
        """
        rows, long = truncated(self.processor, *texts, max_length=self.max_length)
        return {name: rows.get(name, []) for name in self._columns}, long

    def match_inputs(self, model: Any) -> None:
        """Check the tokenizer against the model, and find out if the model reads token types.

        Some models take them for words (GPT-2), so types that are all 0 must not change the output.
        """
        reads_end = bool(getattr(model.config, "is_encoder_decoder", False))
        self._vocabulary = check_vocabulary(self.processor, model, self._model, reads_end=reads_end)
        if self._types is not None or not self._returns_types:
            return
        ids = torch.tensor(
            [self.processor("a")["input_ids"]], device=next(model.parameters()).device
        )
        with torch.no_grad():
            try:
                without = model(input_ids=ids).logits
                with_zeros = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
            except Exception:  # the model does not know them; if it does not run, the trial says so
                return
        if torch.allclose(without, with_zeros, rtol=1e-3, atol=1e-5):
            self._columns.append("token_type_ids")

    def probe(self) -> Examples:
        texts = ["a short text", "another text, which is longer than the first one"]
        pairs = [texts] if self.recipe.text_pair is None else [texts, texts]
        tokens, _ = self._tokenize(pairs)
        ids = tokens["input_ids"]
        inner = slice(1, -1)  # special tokens keep their places
        mirrored = [*ids[1][:1], *ids[1][inner][::-1], *ids[1][1:][-1:]]
        columns = {name: ragged([*rows, rows[1]]) for name, rows in tokens.items()}
        columns["input_ids"] = ragged([*ids, mirrored])
        return Examples({**columns, "labels": list(torch.zeros(3, dtype=torch.int64).unbind())})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack examples.

        Returns:
            ``input_ids``, ``attention_mask`` and, if the model has token types, ``token_type_ids``,
            all ``(batch, longest)``, and ``labels`` ``(batch,)``.
        """
        rows = {
            name: [column[index] for index in indices] for name, column in examples.columns.items()
        }
        side: Literal["left", "right"] = "left" if self.padding == "left" else "right"
        batch = pad_tokens(rows["input_ids"], self.pad_token_id, side)
        batch["labels"] = torch.stack(rows["labels"])
        if "token_type_ids" in rows:
            type_of_padding = self.processor.pad_token_type_id
            batch["token_type_ids"] = pad(rows["token_type_ids"], type_of_padding, side)
        return batch

"""Base of tasks that predict labels or a number for a text or a pair of texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.tasks.encoder import EncoderTask, loading_code
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.labels import blank_table
from fedmerge_peft.tasks.tokenization import ragged, read_texts, reject_empty

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe


class TextTask(EncoderTask):
    """Task on the one or two text columns that its section of the recipe names."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    reads_last_token: ClassVar[bool] = True
    loading_code: ClassVar[str] = loading_code("AutoModelForSequenceClassification")

    @property
    def reads_pairs(self) -> bool:
        return self.recipe.text_pair is not None

    @classmethod
    @abstractmethod
    def targets(cls, recipe: Any, table: Dataset, labels: Sequence[str]) -> Tensor:
        """Return the tensor ``labels`` of all rows, ``(rows, ...)``.

        Raises ``DataError`` if the columns do not match the recipe.
        """

    @classmethod
    def check_table(cls, recipe: Any, table: Dataset) -> None:
        read_texts(table, recipe.text, "task.text")
        if recipe.text_pair is not None:
            read_texts(table, recipe.text_pair, "task.text_pair")
        cls.targets(recipe, table, cls.output_names(recipe, table))

    @classmethod
    def probe_inputs(cls, recipe: Any) -> list[Any]:
        texts = super().probe_inputs(recipe)
        return texts if recipe.text_pair is None else [(text, text) for text in texts]

    @classmethod
    def input_table(cls, recipe: Any, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Value

        columns = [name for name in (recipe.text, recipe.text_pair) if name is not None]
        pairs = len(columns) == 2
        rows = [
            list(item) if pairs and isinstance(item, tuple | list) else [item] for item in inputs
        ]
        unfit = [
            row if pairs else row[0]
            for row in rows
            if len(row) != len(columns) or not all(isinstance(text, str) for text in row)
        ]
        reject_inputs(unfit, "a pair of texts" if pairs else "a text")
        texts = {name: Value("string") for name in columns}
        return blank_table(texts, rows, cls.blanks(recipe, labels))

    @classmethod
    def pipeline_options(cls, recipe: Any, backbone: BackboneRecipe, folder: str) -> dict[str, Any]:
        return {**super().pipeline_options(recipe, backbone, folder), "truncation": True}

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row. ``Examples.cuts`` lists truncated and empty rows.

        Raises:
            DataError: A text column does not exist, has nulls, or is not text; the tokenizer fails
                on a text, or reads a part of it as a special token; a text has no tokens, or tokens
                that the model does not have; ``targets`` rejects the labels or numbers.
        """
        labels = self.targets(self.recipe, table, self.labels)
        texts = [read_texts(table, self.recipe.text, "task.text")]
        if self.recipe.text_pair is not None:
            texts.append(read_texts(table, self.recipe.text_pair, "task.text_pair"))
        tokens, truncated = self.tokenize(texts)
        reject_empty(tokens["input_ids"], texts[0], self.recipe.text)
        self.check_ids(tokens["input_ids"])
        return Examples(
            {
                **{name: ragged(rows) for name, rows in tokens.items()},
                "labels": list(labels.unbind()),
            },
            {
                f"are longer than {self.max_length} tokens and were truncated": truncated,
                "have an empty text": [
                    row
                    for row, parts in enumerate(zip(*texts, strict=True))
                    if not any(part.strip() for part in parts)
                ],
            },
        )

"""Classification of texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedmerge_peft.tasks.classification import Classification
from fedmerge_peft.tasks.labels import encode_labels, infer_labels
from fedmerge_peft.tasks.texts import TextTask

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.tasks import SequenceClassificationRecipe


class SequenceClassificationTask(Classification, TextTask):
    """Classification of texts; ``EncoderTask`` has the arguments."""

    @classmethod
    def output_names(cls, recipe: SequenceClassificationRecipe, table: Dataset) -> list[str]:
        return infer_labels(table, recipe.label, recipe.num_labels)

    @classmethod
    def targets(
        cls, recipe: SequenceClassificationRecipe, table: Dataset, labels: Sequence[str]
    ) -> Tensor:
        return encode_labels(table, recipe.label, labels)

    @classmethod
    def blanks(
        cls, recipe: SequenceClassificationRecipe, labels: Sequence[str]
    ) -> dict[str, tuple[Any, Any]]:
        from datasets import ClassLabel

        return {recipe.label: (ClassLabel(names=list(labels)), 0)}

    def named(self, target: Tensor) -> str:
        return self.labels[int(target)]

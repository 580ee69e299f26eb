"""What a federation trains on: text classification, causal language modelling, image classification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmerge_peft.tasks.base import Batch, Examples, Predictions, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import Recipe

__all__ = ["Batch", "Examples", "Predictions", "Task", "make_task"]


def make_task(recipe: Recipe, table: Dataset, model_folder: str) -> Task:
    """The task that the recipe names.

    Args:
        recipe: Its ``task`` and ``backbone`` are read.
        table: All rows of the federation; labels are told from all of them, and columns checked.
        model_folder: Local folder or hub id of the model, whose tokenizer or image processor is loaded.

    Raises:
        DataError: Where the data are not what the recipe says.
        BackboneError: Where the tokenizer or image processor cannot be loaded.
    """
    match recipe.task.name:
        case "sequence-classification":
            from fedmerge_peft.tasks.sequence_classification import SequenceClassificationTask

            return SequenceClassificationTask(recipe.task, recipe.backbone, table, model_folder)
        case "causal-lm":
            from fedmerge_peft.tasks.causal_lm import CausalLMTask

            return CausalLMTask(recipe.task, recipe.backbone, table, model_folder)
        case "image-classification":
            from fedmerge_peft.tasks.image_classification import ImageClassificationTask

            return ImageClassificationTask(recipe.task, recipe.backbone, table, model_folder)

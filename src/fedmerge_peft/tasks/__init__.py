"""Tasks: from examples to batches, losses and metrics.

The module of a task has the task's name; ``base`` has the interface. The other modules contain
parts of tasks, most of which several tasks share:

- classes and labels: ``labels``, ``lists``, ``label_sets``, ``classification``, ``regression``,
  ``choices``, ``choice_labels``, ``imbalance``
- models that a Python program passes as objects: ``in_memory``
- inputs and outputs: ``inputs``, ``predictions``, ``row_names``
- texts: ``token_task``, ``encoder``, ``texts``, ``text_tokens``, ``text_formats``,
  ``tokenization``, ``vocabulary``
- words and spans: ``words``, ``tagged_words``, ``spans``, ``answer_windows``
- chats: ``chat_messages``, ``chat_template``, ``chat_tokens``, ``chat_turns``
- generated text: ``text_generation``, ``generation``
- images and sounds: ``media``, ``media_files``, ``images``, ``pictures``, ``pixels``, ``sound``
- metrics: ``metrics``, ``calibration``, and the modules ``..._metrics`` for some kinds of output
- rows after tokenization and truncation: ``shown``, ``cuts``, ``equal_targets``
- division of batches into passes of the model: ``passes``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fedmerge_peft.errors import DataError
from fedmerge_peft.plugins import TASKS
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.tasks.imbalance import check_class_weights
from fedmerge_peft.tasks.predictions import Predictions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from fedmerge_peft.recipe.schema import Recipe
    from fedmerge_peft.recipe.tasks import TaskRecipe

__all__ = ["Batch", "Examples", "Predictions", "Task", "check_table", "make_task", "task_type"]


def task_type(recipe: TaskRecipe) -> type[Task]:
    """Return the class of the task that a recipe names."""
    return cast("type[Task]", TASKS[recipe.name].load())


def check_table(recipe: TaskRecipe, table: Dataset) -> None:
    """Check columns and labels of a table against a task's section, without loading a model.

    Raises:
        DataError: A column does not exist, has an unsuitable type, or has missing or invalid
            values; or all labels are the same class.
        RecipeError: The section names a label that the data do not have.
    """
    kind = task_type(recipe)
    kind.check_table(recipe, table)
    if recipe.has_labels:
        labels = kind.labels_in(recipe, table) or ()
        reject_one_class(kind, labels)
        check_class_weights(recipe, labels)


def reject_one_class(task: type[Task] | Task, labels: Sequence[str]) -> None:
    """Raise ``DataError`` if loss terms have one class each, and ``labels`` is a single one."""
    if task.names_classes and len(labels) == 1:
        raise DataError(
            f"task: all labels in the data are {labels[0]!r}, so there is nothing to learn; name "
            "the column with the labels, or relax data.filter"
        )


def make_task(recipe: Recipe, table: Dataset, model_folder: str) -> Task:
    """Return the task that the recipe names.

    Args:
        recipe: Its sections ``task`` and ``backbone`` are used.
        table: All rows of the federation, to infer the labels and check the columns.
        model_folder: Local folder or hub id of the model with the tokenizer, or with the processor
            of images or sounds.

    Raises:
        DataError: The data do not match the recipe.
        RecipeError: The recipe names a label that the data do not have, or a metric or loss that
            does not suit them.
        BackboneError: The tokenizer, the processor or the model's configuration cannot be loaded.
    """
    task = task_type(recipe.task)(recipe.task, recipe.backbone, table, model_folder)
    check_class_weights(recipe.task, task.labels)
    return task

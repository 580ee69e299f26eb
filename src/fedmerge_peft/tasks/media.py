"""Base of tasks on images or audio, with models that have a head for labels or numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fedmerge_peft.data.columns import check_column
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.tasks.in_memory import passed_processor
from fedmerge_peft.tasks.tokenization import load_pretrained

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe

_LOADING = """{{imports}}from peft import PeftModel
from transformers import {processor}, {model}

labels = {{labels}}
base = {model}.from_pretrained(
    {{base}}, num_labels=len(labels), id2label=dict(enumerate(labels)),{problem} {{options}}
)
processor = {processor}.from_pretrained({{processor}}{further})
{{load}}
"""


def loading_code(
    model: str, processor: str, further: str = "", problem_type: str | None = None
) -> str:
    """Return ``Task.loading_code`` of a model for images or sounds.

    Args:
        model: Transformers class of the model.
        processor: Transformers class of the processor.
        further: Further arguments of the processor's ``from_pretrained``, beginning with a comma.
        problem_type: Name of the loss in the model's configuration; None if there is none.
    """
    problem = "" if problem_type is None else f'\n    problem_type="{problem_type}",'
    return _LOADING.format(model=model, processor=processor, further=further, problem=problem)


class MediaTask(Task):
    """Prediction of labels or numbers from images or sounds.

    The model's own processor converts each image or sound once.

    Args:
        recipe: Columns, labels and metrics.
        backbone: Location of the processor.
        table: All rows of the federation, from which the labels are inferred.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: A column does not exist, or the labels do not match the recipe.
        BackboneError: The processor cannot be loaded.
    """

    medium: ClassVar[str]
    """Recipe key of the column, image or audio."""
    auto_processor: ClassVar[str]
    """Transformers class that loads the processor."""
    processor_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the processor's ``from_pretrained``."""
    pipeline_argument: ClassVar[str]
    """Argument of ``transformers.pipeline`` for the processor."""
    # PEFT's task types are for text models. Without a task type, PEFT models accept other inputs.
    peft_task_type: ClassVar[str | None] = None

    def __init__(
        self, recipe: Any, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        self.recipe = recipe
        self.metrics = recipe.metrics
        self.check_table(recipe, table)
        self.labels = self.output_names(recipe, table)
        self.processor = self.load_processor(backbone, model_folder)

    @classmethod
    def check_table(cls, recipe: Any, table: Dataset) -> None:
        check_column(table, recipe.media_column, f"task.{cls.medium}")
        cls.targets(recipe, table, cls.output_names(recipe, table))

    @classmethod
    @abstractmethod
    def output_names(cls, recipe: Any, table: Dataset) -> list[str]:
        """Return the names of the head's outputs.

        Raises ``DataError`` if the columns do not match the recipe.
        """

    @classmethod
    @abstractmethod
    def targets(cls, recipe: Any, table: Dataset, labels: Sequence[str]) -> Tensor:
        """Return the tensor ``labels`` of all rows, ``(rows, ...)``.

        Raises ``DataError`` if the columns do not match the recipe.
        """

    @classmethod
    def load_processor(cls, backbone: BackboneRecipe, folder: str) -> Any:
        """Return a copy of the processor that a program passed with the model, or load one.

        Raises:
            BackboneError: The processor cannot be loaded, or the passed model is not in memory.
        """
        import transformers

        if (passed := passed_processor(backbone.model)) is not None:
            return passed
        separate = backbone.tokenizer is not None
        source, revision = backbone.tokenizer or folder, None if separate else backbone.revision
        auto = getattr(transformers, cls.auto_processor)
        return load_pretrained(auto, source, backbone, revision, **cls.processor_options)

    @classmethod
    def pipeline_options(cls, recipe: Any, backbone: BackboneRecipe, folder: str) -> dict[str, Any]:
        return {cls.pipeline_argument: cls.load_processor(backbone, folder)}

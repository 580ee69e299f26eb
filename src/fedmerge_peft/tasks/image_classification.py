"""Image classification."""

from __future__ import annotations

from typing import ClassVar

from fedmerge_peft.tasks.classification import PROBLEM_TYPE, Classification
from fedmerge_peft.tasks.images import ImageTask
from fedmerge_peft.tasks.media import loading_code


class ImageClassificationTask(Classification, ImageTask):
    """Classification of images; see ``MediaTask`` for the arguments."""

    loading_code: ClassVar[str] = loading_code(
        ImageTask.auto_model, ImageTask.auto_processor, ', backend="pil"', PROBLEM_TYPE
    )

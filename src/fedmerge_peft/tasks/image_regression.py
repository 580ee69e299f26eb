"""Prediction of a number from an image."""

from __future__ import annotations

from typing import ClassVar

from fedmerge_peft.tasks.images import ImageTask
from fedmerge_peft.tasks.media import loading_code
from fedmerge_peft.tasks.regression import PROBLEM_TYPE, Regression


class ImageRegressionTask(Regression, ImageTask):
    """Prediction of numbers from images; see ``MediaTask`` for the arguments."""

    loading_code: ClassVar[str] = loading_code(
        ImageTask.auto_model, ImageTask.auto_processor, ', backend="pil"', PROBLEM_TYPE
    )

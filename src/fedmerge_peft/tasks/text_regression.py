"""Prediction of a number from a text or a pair of texts."""

from __future__ import annotations

from typing import ClassVar

from fedmerge_peft.tasks.encoder import loading_code
from fedmerge_peft.tasks.regression import PROBLEM_TYPE, Regression
from fedmerge_peft.tasks.texts import TextTask


class TextRegressionTask(Regression, TextTask):
    """Prediction of numbers from texts. Arguments are those of ``EncoderTask``."""

    loading_code: ClassVar[str] = loading_code(TextTask.auto_model, PROBLEM_TYPE)

"""Classification of texts and pairs of texts."""

from __future__ import annotations

from typing import ClassVar

from fedmerge_peft.tasks.classification import PROBLEM_TYPE, Classification
from fedmerge_peft.tasks.encoder import loading_code
from fedmerge_peft.tasks.texts import TextTask


class SequenceClassificationTask(Classification, TextTask):
    """Classification of texts or pairs of texts. Arguments are those of ``EncoderTask``."""

    loading_code: ClassVar[str] = loading_code(TextTask.auto_model, PROBLEM_TYPE)

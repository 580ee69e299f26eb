"""Classification of texts and pairs of texts."""

from __future__ import annotations

from fedmerge_peft.tasks.classification import Classification
from fedmerge_peft.tasks.texts import TextTask


class SequenceClassificationTask(Classification, TextTask):
    """Classification of texts or pairs of texts. Arguments are those of ``EncoderTask``."""

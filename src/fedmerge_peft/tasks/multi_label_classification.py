"""Classification of texts, pairs of texts, and images with any number of labels each."""

from __future__ import annotations

from typing import ClassVar

from fedmerge_peft.tasks import encoder, media
from fedmerge_peft.tasks.images import ImageTask
from fedmerge_peft.tasks.label_sets import PROBLEM_TYPE, LabelSets
from fedmerge_peft.tasks.texts import TextTask


class MultiLabelClassificationTask(LabelSets, TextTask):
    """Classification of texts or pairs of texts with any number of labels each.

    Arguments are those of ``EncoderTask``.
    """

    loading_code: ClassVar[str] = encoder.loading_code(TextTask.auto_model, PROBLEM_TYPE)


class MultiLabelImageClassificationTask(LabelSets, ImageTask):
    """Classification of images with any number of labels each.

    Arguments are those of ``MediaTask``.
    """

    loading_code: ClassVar[str] = media.loading_code(
        ImageTask.auto_model, ImageTask.auto_processor, ', backend="pil"', PROBLEM_TYPE
    )

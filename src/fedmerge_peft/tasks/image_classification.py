"""Image classification."""

from __future__ import annotations

from fedmerge_peft.tasks.classification import Classification
from fedmerge_peft.tasks.images import ImageTask


class ImageClassificationTask(Classification, ImageTask):
    """Classification of images; see ``MediaTask`` for the arguments."""

"""Sections of tasks on audio, and on images with several labels or a number."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedmerge_peft.plugins import TASKS
from fedmerge_peft.recipe.label_tasks import LabelSetRecipe, RegressionRecipe
from fedmerge_peft.recipe.tasks import ClassificationRecipe, ImageSettings
from fedmerge_peft.recipe.usual_columns import IMAGE, LABEL, LABELS, NUMBER, UsualColumns, named


class AudioClassificationRecipe(ClassificationRecipe):
    """Classification of sounds: words, speakers, noises."""

    small_model: ClassVar[str | None] = "facebook/wav2vec2-base"
    usual_columns: ClassVar[UsualColumns] = {
        "audio": named("audio sound"),
        "label": named(LABEL.names),
    }

    audio: str = "audio"
    """Column with the sound: the path or the bytes of a WAV file, a datasets Audio of WAV files, or
    an array of samples at the model's sampling rate."""
    max_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 20.0
    """Maximum length in seconds. Longer sounds are cut at their end, and a warning states their
    number."""

    @property
    def media_column(self) -> str:
        return self.audio


TASKS.add(
    "audio-classification",
    "fedmerge_peft.tasks.audio_classification:AudioClassificationTask",
    recipe=AudioClassificationRecipe,
)


class MultiLabelImageClassificationRecipe(ImageSettings, LabelSetRecipe):
    """Any number of labels for each image."""

    usual_columns: ClassVar[UsualColumns] = {"image": IMAGE, "labels": LABELS}


TASKS.add(
    "multi-label-image-classification",
    "fedmerge_peft.tasks.multi_label_classification:MultiLabelImageClassificationTask",
    recipe=MultiLabelImageClassificationRecipe,
)


class ImageRegressionRecipe(ImageSettings, RegressionRecipe):
    """A number for each image."""

    usual_columns: ClassVar[UsualColumns] = {"image": IMAGE, "target": NUMBER}


TASKS.add(
    "image-regression",
    "fedmerge_peft.tasks.image_regression:ImageRegressionTask",
    recipe=ImageRegressionRecipe,
)

"""Image classification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.base import Batch, Examples, reject_inputs
from fedmerge_peft.tasks.classification import (
    Classification,
    encode_labels,
    infer_labels,
    labeled_table,
    reject_nulls,
)
from fedmerge_peft.tasks.tokenization import load_pretrained

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from fedmerge_peft.recipe.schema import BackboneRecipe
    from fedmerge_peft.recipe.tasks import ImageClassificationRecipe

_ROWS_AT_ONCE = 256


class ImageClassificationTask(Classification):
    """Classification of images of any mode and size.

    Images are decoded, converted to RGB and resized once, and stored as 3 · height · width bytes.
    Each batch is rescaled and normalized with the settings of the model's image processor.

    Args:
        recipe: Columns, labels and metrics.
        backbone: Location of the image processor.
        table: All rows of the federation, from which the labels are inferred.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: A column does not exist, or the labels do not match the recipe.
        BackboneError: The image processor cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    # PEFT's task types are for text models. Without one, the PEFT model accepts pixel_values.
    peft_task_type: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "image-classification"
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

labels = {labels}
base = AutoModelForImageClassification.from_pretrained(
    {base}, num_labels=len(labels), id2label=dict(enumerate(labels)), {options}
)
processor = AutoImageProcessor.from_pretrained({processor}, backend="pil")
{load}
"""

    def __init__(
        self,
        recipe: ImageClassificationRecipe,
        backbone: BackboneRecipe,
        table: Dataset,
        model_folder: str,
    ) -> None:
        from transformers import AutoImageProcessor

        self.recipe = recipe
        self.metrics = recipe.metrics
        if recipe.image not in table.column_names:
            raise DataError(
                f"task.image: there is no column {recipe.image!r}; "
                f"the data have {join_values(table.column_names)}"
            )
        self.labels = infer_labels(table, recipe.label, recipe.num_labels)
        separate = backbone.tokenizer is not None
        # The Pillow backend gives the same pixels on machines with and without torchvision.
        self.processor = load_pretrained(
            AutoImageProcessor,
            backbone.tokenizer or model_folder,
            backbone,
            None if separate else backbone.revision,
            backend="pil",
        )

    @classmethod
    def probe_inputs(cls, recipe: ImageClassificationRecipe) -> list[Any]:
        from PIL.Image import new

        return [new("RGB", (32, 32), color) for color in ("black", "orange")]

    @classmethod
    def input_table(
        cls, recipe: ImageClassificationRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        from datasets import Image
        from PIL.Image import Image as Picture

        unfit = [each for each in inputs if not isinstance(each, Picture | str | Path)]
        reject_inputs(unfit, "a PIL image, or the path of a file")
        rows = [[each if isinstance(each, Picture) else str(each)] for each in inputs]
        return labeled_table({recipe.image: Image()}, rows, recipe.label, labels)

    @classmethod
    def pipeline_options(
        cls, recipe: ImageClassificationRecipe, backbone: BackboneRecipe, folder: str
    ) -> dict[str, Any]:
        from transformers import AutoImageProcessor

        elsewhere = backbone.tokenizer is not None
        source, revision = backbone.tokenizer or folder, None if elsewhere else backbone.revision
        processor = load_pretrained(AutoImageProcessor, source, backbone, revision, backend="pil")
        return {"image_processor": processor}

    def encode(self, table: Dataset) -> Examples:
        """Decode and resize every image to uint8 ``(3, height, width)``.

        Raises:
            DataError: An image is missing or cannot be decoded. The message names the row.
            BackboneError: The image processor does not return one uint8 image of the same size for
                each input.
        """
        from datasets import Image

        labels = encode_labels(table, self.recipe.label, self.labels)
        column = table.select_columns([self.recipe.image]).with_format("arrow")
        pixels: list[Tensor] = []
        for start in range(0, len(table), _ROWS_AT_ONCE):
            rows = column[start : start + _ROWS_AT_ONCE].column(self.recipe.image).combine_chunks()
            reject_nulls(rows, self.recipe.image, start)
            try:
                encoded = Image().cast_storage(rows).to_pylist()
            except (TypeError, ValueError, NotImplementedError) as error:
                raise DataError(
                    f"task.image: column {self.recipe.image!r} has the type {rows.type}; "
                    "images are encoded bytes, file paths, or a datasets Image"
                ) from error
            images = [
                self._decode(Image(), value, start + row) for row, value in enumerate(encoded)
            ]
            pixels.extend(self._resize(images))
        return Examples({"pixel_values": pixels, "labels": list(labels.unbind())})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack examples.

        Returns:
            ``pixel_values`` float32 ``(batch, 3, height, width)`` and ``labels`` ``(batch,)``.
        """
        pixels = torch.stack([examples.columns["pixel_values"][index] for index in indices]).float()
        if self.processor.do_rescale:
            pixels *= self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, deviation = (
                torch.as_tensor(value).float().view(-1, 1, 1)
                for value in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = pixels.sub_(mean).div_(deviation)
        return {
            "pixel_values": pixels,
            "labels": torch.stack([examples.columns["labels"][index] for index in indices]),
        }

    def _decode(self, feature: Any, value: dict[str, Any], row: int) -> Image:
        try:
            return as_rgb(feature.decode_example(value))
        except Exception as error:  # Pillow's decoders raise arbitrary errors for damaged bytes
            source = value["path"] or f"{len(value['bytes'] or b'')} bytes"
            raise DataError(
                f"row {row} (of the rows in use): the image in column {self.recipe.image!r} cannot "
                f"be decoded ({source}): {error}"
            ) from error

    def _resize(self, images: list[Image]) -> list[Tensor]:
        """Apply the image processor except for its rescaling and normalization."""
        processed = self.processor(images, do_rescale=False, do_normalize=False)["pixel_values"]
        arrays = [np.asarray(image) for image in processed]
        if any(
            array.dtype != np.uint8 or array.shape != arrays[0].shape or array.ndim != 3
            for array in arrays
        ):
            kinds = sorted({f"{array.dtype} {array.shape}" for array in arrays})
            raise BackboneError(
                f"{type(self.processor).__name__} does not resize images to one size before it "
                f"normalizes them (it returns {join_values(kinds, 3)}); models that accept images "
                "of any size are not supported"
            )
        return list(torch.from_numpy(np.stack(arrays)).unbind())


def as_rgb(image: Image) -> Image:
    """Convert an image of any Pillow mode to RGB.

    Transparency is dropped, gray is repeated, and 16 bits are scaled to 8.
    """
    if image.mode.startswith("I"):
        from PIL.Image import fromarray

        # Some releases of Pillow clip at 255 instead of scaling.
        image = fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about a direct conversion to RGB
    return image.convert("RGB")

"""An image to one of several labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.base import Batch, Examples
from fedmerge_peft.tasks.classification import (
    Classification,
    encode_labels,
    infer_labels,
    reject_nulls,
)
from fedmerge_peft.tasks.tokenization import load_pretrained

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from fedmerge_peft.recipe.schema import BackboneRecipe, ImageClassificationRecipe

_ROWS_AT_ONCE = 256


class ImageClassificationTask(Classification):
    """Images of any mode and size, as RGB of the model's size.

    They are decoded and resized once and kept as bytes, 3 · height · width of them an image; each batch is rescaled and
    normalised as the model's image processor would have done.

    Args:
        recipe: Columns, labels and metrics.
        backbone: Where the image processor is.
        table: All rows of the federation, from which the labels are told.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: For a missing column, or labels that are not what the recipe says.
        BackboneError: Where the image processor cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    # PEFT's task types belong to text models; without one, its wrapper hands pixel_values through.
    peft_task_type: ClassVar[str | None] = None

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
                f"task.image: there is no column {recipe.image!r}; the data have {join_values(table.column_names)}"
            )
        self.labels = infer_labels(table, recipe.label, recipe.num_labels)
        elsewhere = backbone.tokenizer is not None
        # The Pillow backend, also where torchvision is installed: the same pixels on every machine.
        self.processor = load_pretrained(
            AutoImageProcessor,
            backbone.tokenizer or model_folder,
            backbone,
            None if elsewhere else backbone.revision,
            backend="pil",
        )

    def encode(self, table: Dataset) -> Examples:
        """Decode every image and bring it to the model's size: uint8 ``(3, height, width)``.

        Raises:
            DataError: With its row, for an image that is absent or cannot be decoded.
            BackboneError: Where the image processor does not give one uint8 image of the same size for each.
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
                    f"task.image: column {self.recipe.image!r} holds {rows.type}; images are encoded bytes, file paths, or a datasets Image"
                ) from error
            images = [
                self._decode(Image(), value, start + row) for row, value in enumerate(encoded)
            ]
            pixels.extend(self._resize(images))
        return Examples({"pixel_values": pixels, "labels": list(labels.unbind())})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """``pixel_values`` float32 ``(batch, 3, height, width)`` and ``labels`` ``(batch,)``."""
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
        except (
            Exception
        ) as error:  # Pillow's decoders raise whatever the damaged bytes lead them to
            where = value["path"] or f"{len(value['bytes'] or b'')} bytes"
            raise DataError(
                f"row {row} in use: the image in column {self.recipe.image!r} cannot be decoded ({where}): {error}"
            ) from error

    def _resize(self, images: list[Image]) -> list[Tensor]:
        """What the image processor does before it rescales and normalises."""
        processed = self.processor(images, do_rescale=False, do_normalize=False)["pixel_values"]
        arrays = [np.asarray(image) for image in processed]
        if any(
            array.dtype != np.uint8 or array.shape != arrays[0].shape or array.ndim != 3
            for array in arrays
        ):
            kinds = sorted({f"{array.dtype} {array.shape}" for array in arrays})
            raise BackboneError(
                f"{type(self.processor).__name__} does not bring images to one size before it normalises them (it gives "
                f"{join_values(kinds, 3)}); models that take any size are not supported"
            )
        return list(torch.from_numpy(np.stack(arrays)).unbind())


def as_rgb(image: Image) -> Image:
    """An image of any Pillow mode as RGB: transparency is dropped, grey repeated, 16 bits scaled to 8."""
    if image.mode.startswith("I"):
        from PIL.Image import fromarray

        # Pillow's own conversion has clipped at 255 in some releases.
        image = fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")

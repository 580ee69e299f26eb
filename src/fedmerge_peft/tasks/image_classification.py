"""Image classification."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.base import Batch, Examples, reject_inputs
from fedmerge_peft.tasks.classification import Classification
from fedmerge_peft.tasks.in_memory import passed_processor
from fedmerge_peft.tasks.labels import (
    blank_table,
    encode_labels,
    infer_labels,
    reject_nulls,
)
from fedmerge_peft.tasks.pixels import PixelCode, array_image, as_rgb
from fedmerge_peft.tasks.tokenization import load_pretrained
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from fedmerge_peft.recipe.schema import BackboneRecipe
    from fedmerge_peft.recipe.tasks import ImageClassificationRecipe

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 256
_PROBES = ((48, 64), (64, 48), (56, 40))
"""Heights and widths of images that try a model."""
_WHITE = 255
_LARGEST = 50
"""Largest absolute value of scaled and normalized pixels, with a wide margin."""
_PIXELS, _TABLES = "pixel_values", "pixel_tables"


class ImageClassificationTask(Classification):
    """Classification of images of any mode and size.

    Images are decoded, converted to RGB and processed by the model's own image processor once.
    Pixels are stored as 3 · height · width bytes if these restore them exactly (``PixelCode``).

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
        self.recipe = recipe
        self.metrics = recipe.metrics
        self.check_table(recipe, table)
        self.labels = infer_labels(table, recipe.label, recipe.num_labels)
        self.processor = load_image_processor(backbone, model_folder)

    @classmethod
    def check_table(cls, recipe: ImageClassificationRecipe, table: Dataset) -> None:
        if recipe.image not in table.column_names:
            raise DataError(
                f"task.image: there is no column {recipe.image!r}; "
                f"the data have {join_values(table.column_names)}"
            )
        encode_labels(table, recipe.label, infer_labels(table, recipe.label, recipe.num_labels))

    @classmethod
    def probe_inputs(cls, recipe: ImageClassificationRecipe) -> list[Any]:
        from PIL.Image import new

        return [new("RGB", (32, 32), color) for color in ("black", "orange")]

    @classmethod
    def input_table(
        cls, recipe: ImageClassificationRecipe, labels: list[str], inputs: list[Any]
    ) -> Dataset:
        from datasets import ClassLabel, Image
        from PIL.Image import Image as Picture

        unfit = [each for each in inputs if not isinstance(each, Picture | str | Path)]
        reject_inputs(unfit, "a PIL image, or the path of a file")
        rows = [[each if isinstance(each, Picture) else str(each)] for each in inputs]
        label = {recipe.label: (ClassLabel(names=list(labels)), 0)}
        return blank_table({recipe.image: Image()}, rows, label)

    @classmethod
    def pipeline_options(
        cls, recipe: ImageClassificationRecipe, backbone: BackboneRecipe, folder: str
    ) -> dict[str, Any]:
        return {"image_processor": load_image_processor(backbone, folder)}

    def probe(self) -> Examples | None:
        """Return three processed images; None if the processor keeps the sizes of images.

        A warning names pixels that are not scaled.

        Raises:
            BackboneError: The image processor fails on an image.
        """
        from PIL.Image import fromarray

        random = np.random.default_rng(0)
        columns: dict[str, list[Tensor]] = {}
        for height, width in _PROBES:
            pixels = random.integers(0, _WHITE + 1, (height, width, 3), dtype=np.uint8)
            with library_errors(
                lambda reason: BackboneError(
                    f"backbone.model: {type(self.processor).__name__} does not process images: "
                    f"{reason}; name another image processor in backbone.tokenizer"
                )
            ):
                outputs = self._outputs(fromarray(pixels))
            for name, tensor in outputs.items():
                columns.setdefault(name, []).append(tensor)
        if any(len({tensor.shape for tensor in tensors}) > 1 for tensors in columns.values()):
            return None
        largest = max(
            float(pixels.abs().max()) for pixels in columns.get(_PIXELS, [torch.zeros(1)])
        )
        if largest > _LARGEST:
            logger.warning(
                "%s does not scale pixels: they are up to %g, and models usually expect values "
                "near 1 (do_rescale and do_normalize in preprocessor_config.json)",
                type(self.processor).__name__,
                largest,
            )
        labels = torch.zeros(len(_PROBES), dtype=torch.int64)
        return Examples({**columns, "labels": list(labels.unbind())})

    def encode(self, table: Dataset) -> Examples:
        """Decode every image, and run the image processor on it alone.

        Raises:
            DataError: An image is missing, cannot be decoded or processed, or its value of white is
                unknown. The message names the row.
            BackboneError: The image processor does not bring all images to one size.
        """
        labels = encode_labels(table, self.recipe.label, self.labels)
        column = table.select_columns([self.recipe.image]).with_format("arrow")
        columns: dict[str, list[Tensor]] = {}
        for start in range(0, len(table), _ROWS_AT_ONCE):
            rows = column[start : start + _ROWS_AT_ONCE].column(self.recipe.image).combine_chunks()
            reject_nulls(rows, self.recipe.image, start)
            for row, value in enumerate(self._encoded(rows), start):
                image = self._decode(value, rows.type, row)
                for name, tensor in self._process(image, row).items():
                    columns.setdefault(name, []).append(tensor)
        for name in columns.keys() - {_TABLES}:
            self._reject_sizes(name, columns[name])
        return Examples({**columns, "labels": list(labels.unbind())})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack examples.

        Returns:
            The image processor's output, such as ``pixel_values`` float32 ``(batch, 3, height,
            width)``, and ``labels`` ``(batch,)``.
        """
        columns = {
            name: [tensors[index] for index in indices]
            for name, tensors in examples.columns.items()
        }
        if _TABLES in columns:
            pairs = zip(columns[_PIXELS], columns.pop(_TABLES), strict=True)
            columns[_PIXELS] = [PixelCode.decode(codes, table) for codes, table in pairs]
        return {name: torch.stack(tensors) for name, tensors in columns.items()}

    def _encoded(self, rows: Any) -> list[Any]:
        """Return the values of an Arrow array: nested lists, or dicts with ``bytes`` and ``path``.

        Raises:
            DataError: The type is not one of images.
        """
        from datasets import Image

        if isinstance(rows, pa.ExtensionArray):  # Array2D and Array3D of datasets
            rows = rows.storage
        with library_errors(
            lambda reason: DataError(
                f"task.image: column {self.recipe.image!r} has the type {rows.type}; images are "
                f"encoded bytes, file paths, arrays, or a datasets Image ({reason})"
            )
        ):
            kept = rows if _is_list(rows.type) else Image().cast_storage(rows)
        values: list[Any] = kept.to_pylist()
        return values

    def _decode(self, value: Any, kind: Any, row: int) -> Image:
        """Decode one value of an Arrow type to RGB, upright by its EXIF orientation."""
        from datasets import Image

        listed = isinstance(value, list)
        source = kind if listed else value["path"] or f"{len(value['bytes'] or b'')} bytes"
        with library_errors(
            lambda reason: DataError(
                f"row {row} (of the rows in use): the image in column {self.recipe.image!r} cannot "
                f"be decoded ({source}): {reason}"
            )
        ):
            if listed:
                return array_image(np.array(value, _number_type(kind)), self.recipe.white)
            if value["bytes"] is None and Path(value["path"]).is_file():
                # Pillow would leave a damaged file open.
                value = {"path": value["path"], "bytes": Path(value["path"]).read_bytes()}
            return as_rgb(Image().decode_example(value), self.recipe.white)

    def _process(self, image: Image, row: int) -> dict[str, Tensor]:
        """Run the image processor; return its outputs, with pixels as bytes if that is exact."""
        with library_errors(
            lambda reason: DataError(
                f"row {row} (of the rows in use): {type(self.processor).__name__} fails on the "
                f"image of {image.width} × {image.height} pixels: {reason}"
            )
        ):
            outputs = self._outputs(image)
            if _PIXELS in outputs and outputs[_PIXELS].ndim == 3:
                outputs[_PIXELS], outputs[_TABLES] = self._pixel_code.encode(outputs[_PIXELS])
            return outputs

    def _outputs(self, image: Image) -> dict[str, Tensor]:
        """Return the image processor's output on one image, without the axis of the batch."""
        outputs = {}
        for name, values in self.processor([image], return_tensors="np").items():
            tensor = torch.from_numpy(np.array(values[0]))
            real = tensor.is_floating_point() or name == _PIXELS
            outputs[name] = tensor.float() if real else tensor
        return outputs

    @cached_property
    def _pixel_code(self) -> PixelCode:
        """Code of the processor's pixels, from its output on a black and a white image."""
        from PIL.Image import new

        black, white = (self._outputs(new("RGB", (64, 64), name)) for name in ("black", "white"))
        middle = [
            pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
            for pixels in (black[_PIXELS], white[_PIXELS])
        ]
        return PixelCode(*middle)

    def _reject_sizes(self, name: str, tensors: list[Tensor]) -> None:
        sizes = {tuple(tensor.shape): row for row, tensor in reversed(list(enumerate(tensors)))}
        if len(sizes) > 1:
            (size, row), (other, another) = sorted(sizes.items(), key=lambda item: item[1])[:2]
            raise BackboneError(
                f"{type(self.processor).__name__} does not bring images to one size ({name} of row "
                f"{row} has the shape {size}, of row {another} {other}), so they do not fit a "
                "batch; set a fixed size or a crop in preprocessor_config.json, or resize the "
                "images before"
            )


def load_image_processor(backbone: BackboneRecipe, folder: str) -> Any:
    """Return the model's image processor, or the one that a Python program has passed with it.

    Raises:
        BackboneError: It cannot be loaded.
    """
    from transformers import AutoImageProcessor

    if (passed := passed_processor(backbone.model)) is not None:
        return passed
    separate = backbone.tokenizer is not None
    source, revision = backbone.tokenizer or folder, None if separate else backbone.revision
    # The Pillow backend gives the same pixels on machines with and without torchvision.
    return load_pretrained(AutoImageProcessor, source, backbone, revision, backend="pil")


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _number_type(kind: Any) -> Any:
    """Return the numpy type of the numbers in nested lists."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    while _is_list(kind):
        kind = kind.value_type
    return kind.to_pandas_dtype()

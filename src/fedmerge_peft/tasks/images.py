"""Base of tasks on images: decoding, processing, storage as bytes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.base import Batch, Examples
from fedmerge_peft.tasks.in_memory import ImageFunction
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.labels import blank_table
from fedmerge_peft.tasks.media import MediaTask, loading_code
from fedmerge_peft.tasks.pictures import read_images
from fedmerge_peft.tasks.pixels import PixelCode
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


logger = logging.getLogger(__name__)

_PROBES = ((48, 64), (64, 48), (56, 40))
"""Heights and widths of the images of ``probe``, in pixels."""
_WHITE = 255
_LARGEST = 50
"""Largest plausible absolute value of scaled and normalized pixels, with a wide margin."""
_PIXELS, _TABLES = "pixel_values", "pixel_tables"


class ImageTask(MediaTask):
    """Base of tasks that predict labels or numbers from images of any mode and size.

    Images are converted to RGB and processed by the model's own image processor once. Pixels are
    stored as 3 · height · width bytes if these bytes restore them exactly (``PixelCode``). For the
    arguments, see ``MediaTask``.
    """

    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    pipeline: ClassVar[str] = "image-classification"
    medium: ClassVar[str] = "image"
    auto_processor: ClassVar[str] = "AutoImageProcessor"
    # The Pillow backend gives the same pixels on machines with and without torchvision.
    processor_options: ClassVar[Mapping[str, Any]] = {"backend": "pil"}
    pipeline_argument: ClassVar[str] = "image_processor"
    loading_code: ClassVar[str] = loading_code(auto_model, auto_processor, ', backend="pil"')

    @classmethod
    def probe_inputs(cls, recipe: Any) -> list[Any]:
        from PIL.Image import new

        return [new("RGB", (32, 32), color) for color in ("black", "orange")]

    @classmethod
    def input_table(cls, recipe: Any, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Image
        from PIL.Image import Image as Picture

        unfit = [image for image in inputs if not isinstance(image, Picture | str | Path)]
        reject_inputs(unfit, "a PIL image, or the path of a file")
        rows = [[image if isinstance(image, Picture) else str(image)] for image in inputs]
        return blank_table({recipe.image: Image()}, rows, cls.blanks(recipe, labels))

    def probe(self) -> Examples | None:
        """Return three processed images; None if they differ in size after processing.

        Log a warning if the processor does not scale pixels.

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
                    f"backbone.model: {self._processor_name} does not process images: "
                    f"{reason}; name another image processor in backbone.tokenizer or, "
                    "for a model in memory, pass another one (processor=...)"
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
                "near 1; %s",
                self._processor_name,
                largest,
                "divide them in the function"
                if isinstance(self.processor, ImageFunction)
                else "set do_rescale and do_normalize in preprocessor_config.json",
            )
        labels = list(torch.zeros(len(_PROBES), dtype=torch.int64).unbind())
        return Examples({**columns, "labels": labels})

    def encode(self, table: Dataset) -> Examples:
        """Decode all images, and run the image processor on each one separately.

        Raises:
            DataError: An image is missing, or cannot be decoded or processed; the largest possible
                value of its pixels is unknown, and ``task.white`` is not set; in both cases, the
                message names the row. Also raised if the labels do not match the recipe.
            BackboneError: The image processor does not bring all images to one size.
        """
        labels = self.targets(self.recipe, table, self.labels)
        columns: dict[str, list[Tensor]] = {}
        for row, image in enumerate(read_images(table, self.recipe.image, self.recipe.white)):
            for name, tensor in self._process(image, row).items():
                columns.setdefault(name, []).append(tensor)
        for name in columns.keys() - {_TABLES}:
            self._reject_sizes(name, columns[name])
        return Examples({**columns, "labels": list(labels.unbind())})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack examples.

        Returns:
            The image processor's output, such as ``pixel_values`` float32 ``(batch, 3, height,
            width)``, and ``labels``, ``(batch,)``, or ``(batch, labels)`` for sets of labels.
        """
        columns = {
            name: [tensors[index] for index in indices]
            for name, tensors in examples.columns.items()
        }
        if _TABLES in columns:
            pairs = zip(columns[_PIXELS], columns.pop(_TABLES), strict=True)
            columns[_PIXELS] = [PixelCode.decode(codes, table) for codes, table in pairs]
        return {name: torch.stack(tensors) for name, tensors in columns.items()}

    def _process(self, image: Image, row: int) -> dict[str, Tensor]:
        """Run the image processor; return its outputs, with pixels as ``PixelCode.encode`` does.

        The table of the code is in ``pixel_tables``. Raises ``DataError`` that names the row if the
        processor fails.
        """
        with library_errors(
            lambda reason: DataError(
                f"{row_name(row)}: {self._processor_name} fails on the "
                f"image of {image.width} × {image.height} pixels: {reason}; replace "
                "the image, or remove it"
            )
        ):
            outputs = self._outputs(image)
            if _PIXELS in outputs and outputs[_PIXELS].ndim == 3:
                outputs[_PIXELS], outputs[_TABLES] = self._pixel_code.encode(outputs[_PIXELS])
            return outputs

    def _outputs(self, image: Image) -> dict[str, Tensor]:
        """Return the image processor's output for one image, without the batch axis."""
        outputs = {}
        for name, values in self.processor([image], return_tensors="np").items():
            tensor = torch.from_numpy(np.array(values[0]))
            real = tensor.is_floating_point() or name == _PIXELS
            outputs[name] = tensor.float() if real else tensor
        return outputs

    @cached_property
    def _pixel_code(self) -> PixelCode:
        """Code that stores processed pixels as bytes, derived from a black and a white image."""
        from PIL.Image import new

        black, white = (self._outputs(new("RGB", (64, 64), name)) for name in ("black", "white"))
        middle = [
            pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
            for pixels in (black[_PIXELS], white[_PIXELS])
        ]
        return PixelCode(*middle)

    @property
    def _processor_name(self) -> str:
        """Name of the image processor, for messages."""
        own = isinstance(self.processor, ImageFunction)
        return "the function in processor=..." if own else type(self.processor).__name__

    def _reject_sizes(self, name: str, tensors: list[Tensor]) -> None:
        sizes = {tuple(tensor.shape): row for row, tensor in reversed(list(enumerate(tensors)))}
        if len(sizes) > 1:
            (size, row), (other, another) = sorted(sizes.items(), key=lambda item: item[1])[:2]
            remedy = (
                "return images of one size"
                if isinstance(self.processor, ImageFunction)
                else "set a fixed size or a crop in preprocessor_config.json"
            )
            raise BackboneError(
                f"{self._processor_name} does not bring images to one size ({name} has the shape "
                f"{size} in row {row}, but {other} in row {another}, from 0), so they do not fit "
                f"a batch; {remedy}, or resize the images before the run"
            )

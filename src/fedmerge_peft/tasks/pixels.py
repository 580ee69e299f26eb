"""Conversion of images to 8-bit RGB, and exact storage of processed pixels as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

_WHITE_8, _WHITE_12, _WHITE_16 = 255, 4095, 65535


def as_rgb(image: Image, white: float | None = None) -> Image:
    """Convert an image of any Pillow mode to RGB.

    Transparency is dropped, and gray is repeated in all three channels. Images with more than 8
    bits are scaled so that ``white`` becomes 255.

    Args:
        image: Image.
        white: Value of white in images with more than 8 bits. None to infer it (``array_image``).

    Raises:
        ValueError: ``white`` is None and cannot be inferred; a pixel is negative, NaN, or larger
            than ``white``; Pillow cannot convert the mode.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return array_image(np.asarray(image), white)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about a direct conversion to RGB
    return image.convert("RGB")


def array_image(values: NDArray[Any], white: float | None = None) -> Image:
    """Convert an array to an RGB image.

    Args:
        values: ``(height, width)``, or ``(height, width, channels)`` with 1, 3 or 4 channels.
        white: Value of white; always 255 in uint8 arrays. None to infer it from the largest value:
            65535 if this value is 0; in arrays of integers, also if it is from 4096 to 65535; 255
            in arrays of integers with 3 or 4 channels if it is at most 255.

    Raises:
        ValueError: The array is empty or has another shape; ``white`` is None and cannot be
            inferred; a value is negative, NaN, or larger than ``white``.
    """
    from PIL.Image import fromarray

    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    fits = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not (fits and values.size):
        raise ValueError(
            f"it has the shape {values.shape}, expected (height, width), or (height, width, "
            "channels) with 1, 3 or 4 channels"
        )
    return fromarray(_to_bytes(values, white)).convert("RGB")


def _to_bytes(values: NDArray[Any], white: float | None) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    integers = values.dtype.kind in "iu"
    low, high = values.min(), values.max()
    if not low >= 0:  # also true for NaN
        raise ValueError(
            f"its values range from {low:g} to {high:g}, but must not be negative or NaN; correct "
            "the image"
        )
    if white is None:
        if (integers and _WHITE_12 < high <= _WHITE_16) or high == 0:
            white = _WHITE_16
        elif integers and values.ndim == 3 and high <= _WHITE_8:
            white = _WHITE_8
        else:  # 12-bit values are often stored in 16 bits, and would be almost black
            raise ValueError(
                f"its values are {values.dtype} from {low:g} to {high:g}, so the value of white is "
                "not known; set task.white, such as 65535 for 16 bits, 4095 for 12 bits, or "
                "1.0 for fractions"
            )
    if high > white:
        raise ValueError(
            f"its values range from {low:g} to {high:g}, but task.white is {white:g}; raise "
            "task.white, or correct the image"
        )
    if integers and white == _WHITE_16:  # as Pillow reads 16-bit colors
        return (values.astype(np.int64) >> 8).astype(np.uint8)
    return np.rint(values.astype(np.float64) * (_WHITE_8 / white)).astype(np.uint8)


@dataclass(frozen=True)
class PixelCode:
    """Code that stores processed pixels as bytes, in a quarter of the memory.

    A processor maps each byte of a channel to one number. Up to rounding, these numbers are evenly
    spaced between the numbers of black and white. A table of the numbers by channel and byte
    restores the pixels exactly.

    Args:
        black: Pixel values of a black image, by channel, ``(channels,)`` float32.
        white: Pixel values of a white image, of the same shape.
    """

    black: Tensor
    white: Tensor

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the pixels of one image to bytes.

        Args:
            pixels: ``(channels, height, width)`` float32.

        Returns:
            uint8 codes of the same shape, and the pixel values by channel and code, ``(channels,
            256)`` float32. If codes would not restore the pixels exactly, the pixels themselves and
            an empty table.
        """
        low, step = (
            values.view(-1, 1, 1) for values in (self.black, (self.white - self.black) / _WHITE_8)
        )
        numbers = ((pixels - low) / step).round_()
        if bool(((numbers >= 0) & (numbers <= _WHITE_8)).all()):  # False for NaN
            codes = numbers.to(torch.uint8)
            table = torch.zeros(len(pixels), _WHITE_8 + 1)
            table.scatter_(1, codes.flatten(1).long(), pixels.flatten(1))
            if torch.equal(self.decode(codes, table), pixels):
                return codes, table
        return pixels, torch.empty(0)

    @staticmethod
    def decode(codes: Tensor, table: Tensor) -> Tensor:
        """Return the pixels that ``encode`` converted, ``(channels, height, width)`` float32."""
        if not len(table):
            return codes
        return table.gather(1, codes.flatten(1).long()).view(codes.shape)

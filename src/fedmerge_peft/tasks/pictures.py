"""Reading of images in columns: files, encoded bytes, arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import reject_nulls
from fedmerge_peft.tasks.media_files import read_file
from fedmerge_peft.tasks.pixels import array_image, as_rgb
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.library_errors import library_errors
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_ROWS_AT_ONCE = 256

_LONGEST_PATH = 300
"""Maximum number of characters of a path in messages. A longer path may be a base64 image."""


def read_images(table: Dataset, column: str, white: float | None) -> Iterator[Image]:
    """Yield the image of each row in RGB, upright by its EXIF orientation.

    Args:
        table: Rows.
        column: Column with images.
        white: Value of white in images with more than 8 bits, as in ``as_rgb``.

    Raises:
        DataError: The column's type is not one of images; an image is missing or cannot be decoded;
            an image needs ``white``, which is None; a pixel is negative, NaN, or exceeds ``white``.
            Except for a wrong type, the message names the row.
    """
    entries = table.select_columns([column]).with_format("arrow")
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = entries[start : start + _ROWS_AT_ONCE].column(column).combine_chunks()
        reject_nulls(rows, column, start)
        for row, value in enumerate(_values(rows, column), start):
            yield _decode(value, rows.type, column, row, white)


def _values(rows: Any, column: str) -> list[Any]:
    """Return the values of an Arrow array: nested lists, or dicts with ``bytes`` and ``path``.

    Raises:
        DataError: The array's type is not one of images.
    """
    from datasets import Image

    if isinstance(rows, pa.ExtensionArray):  # Array2D and Array3D of datasets
        rows = rows.storage
    with library_errors(
        lambda reason: DataError(
            f"task.image: column {column!r} has the type {rows.type}; images are "
            f"encoded bytes, file paths, arrays, or a datasets Image ({reason})"
        )
    ):
        kept = rows if _is_list(rows.type) else Image().cast_storage(rows)
    values: list[Any] = kept.to_pylist()
    return values


def _decode(value: Any, kind: Any, column: str, row: int, white: float | None) -> Image:
    """Decode one value to an RGB image. Raises ``DataError`` that names the row if this fails."""
    from datasets import Image

    listed = isinstance(value, list)
    path = "" if listed else value["path"] or ""
    source = (
        kind if listed else shortened(path, _LONGEST_PATH) or f"{len(value['bytes'] or b'')} bytes"
    )
    with library_errors(
        lambda reason: DataError(
            f"{row_name(row)}: the image in column {column!r} cannot "
            f"be decoded ({source}): {reason}"
        )
    ):
        if listed:
            return array_image(np.array(value, _number_type(kind)), white)
        if value["bytes"] is None and not path.startswith("data:"):
            # Pillow would leave a damaged file open, and datasets would download a URL.
            value = {"path": path, "bytes": read_file(path)}
        return as_rgb(Image().decode_example(value), white)


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

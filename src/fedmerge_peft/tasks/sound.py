"""Reading of sounds as samples, from WAV files and arrays."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import reject_nulls
from fedmerge_peft.tasks.media_files import read_file
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.library_errors import library_errors
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

Samples = NDArray[np.float32]
"""Samples of one channel, ``(n,)``, normally from -1 to 1."""
_LOUDEST = 32.0
"""Largest accepted absolute value of a sample. Recordings may slightly exceed 1; unscaled integers
far exceed it."""
_STREAMED = 2**31 - 2**16
"""Smallest length in a WAV header that counts as a placeholder, as 0 does. Programs that stream a
file write a placeholder, because they do not know its length yet."""
_SHORTEST = 0.05
"""Shortest accepted sound in seconds. For even shorter ones, models may have no output."""


def read_sounds(table: Dataset, column: str, rate: int) -> Iterator[Samples]:
    """Yield the samples of each row.

    Args:
        table: Rows.
        column: Column with values that ``read_sound`` accepts.
        rate: Sampling rate of the model, Hz.

    Raises:
        DataError: A value is missing or too short, or ``read_sound`` rejects it. The message names
            the row.
    """
    values = table.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()
    reject_nulls(values, column)
    for row, value in enumerate(values):
        with library_errors(partial(_fault, row, column, value)):
            sound = read_sound(value.as_py(), rate)
            if len(sound) < _SHORTEST * rate:
                raise ValueError(f"it is shorter than {_SHORTEST} seconds; remove it")
        yield sound


def _fault(row: int, column: str, value: Any, reason: str) -> DataError:
    source = None if pa.types.is_list(value.type) else value.as_py()
    source = source.get("path") if isinstance(source, dict) else source
    named = f"of type {value.type}"
    if isinstance(source, str) and source:
        named = shortened(source, 80)
    return DataError(
        f"{row_name(row)}: the sound in column {column!r} cannot be read ({named}): {reason}"
    )


def read_sound(value: Any, rate: int) -> Samples:
    """Return the samples of one value of a column.

    Channels are averaged. Signed integers of up to 32 bits and unsigned integers of 8 bits are
    scaled by the range of their type.

    Args:
        value: Path of a WAV file, its bytes, ``{"path", "bytes"}`` as in datasets' Audio, an array
            ``(n,)`` or ``(n, channels)`` with ``rate`` samples per second, or
            ``{"array", "sampling_rate"}``.
        rate: Sampling rate of the model, Hz.

    Raises:
        ValueError: The value is not a sound, cannot be read, or has another sampling rate; a sample
            is not finite or far exceeds 1.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        samples, own = np.asarray(value["array"]), int(value.get("sampling_rate") or rate)
    elif isinstance(value, str | bytes | dict):
        own, samples = _read_wave(_content(value))
    else:
        samples, own = np.asarray(value), rate
    if own != rate:
        raise ValueError(
            f"it has {own} samples per second, and the model expects {rate}; resample it, for "
            f"example with ffmpeg -i in.wav -ar {rate} out.wav"
        )
    mono = _scaled(samples)
    if not np.isfinite(mono).all():
        raise ValueError(
            "it has samples that are not finite (NaN or infinite); correct or remove it"
        )
    if (peak := np.abs(mono).max(initial=0.0)) > _LOUDEST:
        raise ValueError(
            f"its samples range up to {peak:,.0f}, but must be fractions from -1 to 1; divide them "
            "by their range, such as 32768 for 16 bits"
        )
    return mono


def _content(value: str | bytes | dict[str, Any]) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or b""
    return read_file(value) if isinstance(value, str) else value


def _read_wave(content: bytes) -> tuple[int, NDArray[Any]]:
    """Return the sampling rate and the samples ``(n,)`` or ``(n, channels)`` of a WAV file."""
    from scipy.io import wavfile

    if not content:
        raise ValueError("there are no bytes; write the path of a WAV file that is not empty")
    if content[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        raise ValueError(
            "it is not a WAV file; convert it, for example with ffmpeg -i in.mp3 -ac 1 out.wav"
        )
    order: Literal["little", "big"] = "big" if content[:4] == b"RIFX" else "little"
    length = int.from_bytes(content[4:8], order)
    if length == 0 or length >= _STREAMED:
        length = max(0, len(content) - 8)
        content = content[:4] + length.to_bytes(4, order) + content[8:]
    elif (missing := length + 8 - len(content)) > 1:  # one missing byte is padding
        raise ValueError(
            f"a damaged WAV file: {missing:,} of {length + 8:,} bytes are missing; copy it again, "
            "or remove it"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown chunks, such as titles of songs
        try:
            rate, samples = wavfile.read(io.BytesIO(content))
        except (ValueError, EOFError, struct.error) as error:
            raise ValueError(
                f"a damaged WAV file, or one of an unknown kind ({error}); convert it, for example "
                "with ffmpeg -i in.wav -c:a pcm_s16le out.wav"
            ) from error
    return int(rate), samples


def _scaled(samples: NDArray[Any]) -> Samples:
    """Return the mean of the channels, with integers scaled as in ``read_sound``.

    Raises ``ValueError`` for an array that is not ``(n,)`` or ``(n, channels)``, has more channels
    than samples, or contains 64-bit integers or values that are not real numbers.
    """
    if samples.dtype.kind not in "iuf" or samples.ndim not in (1, 2):
        raise ValueError(
            "it is not an array of numbers with one or two dimensions, but has the type "
            f"{samples.dtype} and {samples.ndim} dimension{'s' * (samples.ndim != 1)}"
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        raise ValueError(
            f"it has the shape {samples.shape}, not (samples,) or (samples, channels); transpose "
            "it if the channels come first"
        )
    if samples.dtype.kind in "iu" and samples.dtype.itemsize > 4:
        raise ValueError(
            "its samples are integers without a known range; write fractions from -1 to 1, such as "
            "samples of 16 bits divided by 32768"
        )
    real: NDArray[np.floating] = samples.astype(np.float64)
    if samples.dtype == np.uint8:  # 8-bit WAV files are unsigned
        real = (real - 128) / 128
    elif samples.dtype.kind == "i":
        real = real / -float(np.iinfo(samples.dtype).min)
    mono: Samples = (real if real.ndim == 1 else real.mean(axis=1)).astype(np.float32)
    return mono

"""Rejection of invalid inputs of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedmerge_peft.errors import DataError
from fedmerge_peft.util.text import shortened


def reject_inputs(invalid: Sequence[Any], expected: str) -> None:
    """Raise ``DataError`` for the first invalid input; return if there is none."""
    if invalid:
        raise DataError(f"an input must be {expected}, found {shortened(repr(invalid[0]), 200)}")

"""Names of rows in error messages: rows of the data, or inputs of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_NAME = "row {} (from 0, of the rows that the run uses)"
_INPUT = "input {} (from 0, of all inputs)"
_INPUTS: ContextVar[Sequence[int] | None] = ContextVar("inputs", default=None)
"""Number of the input in each row, if the rows are inputs of predictions."""


def row_name(row: int) -> str:
    """Return the name of a row, such as ``row 7 (from 0, of the rows that the run uses)``."""
    inputs = _INPUTS.get()
    return _NAME.format(row) if inputs is None else _INPUT.format(inputs[row])


@contextmanager
def rows_are_inputs(inputs: Sequence[int]) -> Iterator[None]:
    """Name rows as inputs of predictions inside the context.

    Args:
        inputs: Number of the input in each row, from 0.
    """
    token = _INPUTS.set(inputs)
    try:
        yield
    finally:
        _INPUTS.reset(token)

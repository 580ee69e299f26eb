"""Ranges of the numbers and texts that come from other machines and from files.

Fields of messages and files are annotated with one of these types, and pydantic checks them.
Values are not converted, except integers to floats. The upper bounds are far beyond honest values;
they keep sums finite in float64 and squared norms finite in float32.
"""

from __future__ import annotations

from typing import Annotated
from unicodedata import category

from pydantic import AfterValidator, Field, ValidationError

from fedmerge_peft.util.text import printable, shortened

MAX_COUNT = 10**9
MAX_NORM = 1e9
"""Largest L2 norm of an adapter or update. The squared norm of a sum of a million of these fits
float32."""
MAX_SCORE = 1e30
MAX_SECONDS = 1e9
MAX_NAME = 256
MAX_REASON = 4096

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them."""


def _without_control(text: str) -> str:
    for character in text:
        if character in _DIRECTIONS or category(character) in {"Cc", "Cs", "Zl", "Zp"}:
            raise ValueError(f"contains the control character {printable(character)}")
    return text


def real(low: float, high: float) -> object:
    """Return pydantic's metadata for a finite number from ``low`` to ``high``."""
    return Field(strict=True, ge=low, le=high, allow_inf_nan=False)


Count = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
"""Number of examples, rounds or values."""
Name = Annotated[str, Field(strict=True, max_length=MAX_NAME), AfterValidator(_without_control)]
"""Name of a client, group, label or column, without control and direction characters."""
Number = Annotated[float, Field(strict=True)]
"""Number in a file; it may be infinite or nan, such as a score of a diverged model."""
Whole = Annotated[int, Field(strict=True, ge=0, le=2**62)]
"""Number of rounds, examples, values or bytes in a file."""
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Loss = Annotated[float, real(-MAX_SCORE, MAX_SCORE)]
"""Loss in nats, or squared error for regression. Negative values are valid."""
Seconds = Annotated[float, real(0.0, MAX_SECONDS)]


def first_fault(invalid: ValidationError) -> str:
    """Describe the first fault that pydantic found: the field, its value and the valid range."""
    fault = invalid.errors(include_url=False, include_context=False)[0]
    where = printable(shortened(".".join(map(str, fault["loc"])), 120))
    if not where and fault["type"] == "value_error":
        return printable(fault["msg"].removeprefix("Value error, "))
    match fault["type"]:
        case "missing":
            return f"{where} is missing"
        case "extra_forbidden":
            return f"{where} is not one of its fields"
    expected = fault["msg"].removeprefix("Value error, ")
    expected = expected.replace("Input should be", "expected").replace("should have", "may have")
    value = printable(shortened(repr(fault["input"]), 60))
    expected = printable(shortened(f"{expected[:1].lower()}{expected[1:]}", 200))
    return f"{where or 'the document'} is {value}: {expected}"

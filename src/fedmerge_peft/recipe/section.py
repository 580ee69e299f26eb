"""The base of all sections of a recipe, and types that several of them use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _yaml_boolean(value: object) -> object:
    """Convert YAML 1.1's words for booleans, such as ``yes``; in other fields they remain text."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


Boolean = Annotated[
    bool,
    BeforeValidator(_yaml_boolean, json_schema_input_type=bool | Literal["yes", "no", "on", "off"]),
]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Scalar = str | int | float | bool


class Section(BaseModel):
    """Base class of all sections: unknown keys are rejected and values are never coerced."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

"""Base class of all sections of a recipe, and types of fields that several sections have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedmerge_peft.recipe.error_messages import found, refuse_values


def _yaml_boolean(value: object) -> object:
    """Convert YAML 1.1's words for booleans, such as ``yes``, which other fields read as text."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


Boolean = Annotated[
    bool,
    BeforeValidator(_yaml_boolean, json_schema_input_type=bool | Literal["yes", "no", "on", "off"]),
]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Adapters = Annotated[int, Field(gt=0, le=1_000)]
"""Number of adapters on the server."""
BatchSize = Annotated[int, Field(gt=0, le=65_536)]
Coefficient = Annotated[float, Field(ge=0, le=1_000)]
"""Weight of a term of the loss, or step size of the merging logits."""
PositiveCoefficient = Annotated[float, Field(gt=0, le=1_000)]
Count = Annotated[int, Field(gt=0, le=1_000_000)]
"""Number of rounds, epochs, steps, clients, examples or tokens."""
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000)]
FileName = Annotated[str, Field(min_length=1, max_length=200)]
"""Name of a file or folder."""
Labels = Annotated[int, Field(gt=0, le=100_000)]
"""Number of classes."""
Norm = Annotated[float, Field(ge=1e-9, le=1e9)]
"""L2 norm of a gradient or an update."""
Passes = Annotated[int, Field(gt=0, le=1_000)]
"""Number of passes of local training in one round."""
Rank = Annotated[int, Field(gt=0, le=4_096)]
"""Rank of an adapter."""
Rate = Annotated[float, Field(gt=0, le=100)]
"""Step size of an optimizer."""
NonEmpty = Annotated[str, Field(min_length=1)]
"""Text that is not empty, such as a path."""
WarmRounds = Annotated[int, Field(gt=0, le=1_000)]
"""Number of rounds before clients are grouped."""
Scalar = str | int | float | bool


def _source(value: str) -> str:
    """Refuse names that a command could take for an option, and unprintable characters."""
    if value.startswith("-") or not value.isprintable():
        raise ValueError(
            f"found {found(value)}, expected only printable characters, and no hyphen at the "
            "beginning; use another name"
        )
    return value


Source = Annotated[str, Field(min_length=1), AfterValidator(_source)]
"""Name of a model, its file or its revision. Exports write it to code, cards and commands."""
FOREIGN = "foreign"
"""Key in pydantic's validation context: true if the recipe comes from an untrusted source."""


class Section(BaseModel):
    """Base class of all sections.

    Unknown keys and values of a wrong type are rejected. Only integers are converted to floats, and
    the words of ``Boolean`` to booleans.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    def __init__(self, **values: Any) -> None:
        """Create a section from values by key. Raises ``RecipeError`` with all faults."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise refuse_values(type(self), values, error) from error

    # Pydantic validates inner sections without this constructor; the outermost one reports faults.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

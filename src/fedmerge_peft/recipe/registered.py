"""Types of fields with values from a registry: sections of several kinds, and names.

Pydantic reads the registry when it builds a section's schema. After a registration,
``registration.rebuild`` builds the schemas again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from fedmerge_peft.plugins import Registry


@dataclass(frozen=True)
class OneOf:
    """Mark a field that holds a section of any kind in a registry.

    Example: ``strategy: Annotated[StrategyRecipe, OneOf(STRATEGIES)]``.
    """

    registry: Registry
    shorthand: bool = True
    """True if ``fedavg`` is accepted as a short form of ``{name: fedavg}``."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        kinds = self.registry.sections()
        if not kinds:
            return core_schema.no_info_plain_validator_function(
                self._refuse, json_schema_input_schema=core_schema.str_schema()
            )
        sections = core_schema.tagged_union_schema(
            {name: handler.generate_schema(section) for name, section in kinds.items()},
            discriminator=self.registry.key,
        )
        if not self.shorthand:
            return sections
        written = core_schema.union_schema([sections, core_schema.literal_schema([*kinds])])
        return core_schema.no_info_before_validator_function(
            self._expand, sections, json_schema_input_schema=written
        )

    def _expand(self, value: object) -> object:
        return {self.registry.key: value} if isinstance(value, str) else value

    def _refuse(self, value: object) -> object:
        """Raise the error of pydantic's tagged union, which cannot have zero kinds."""
        key = self.registry.key
        if isinstance(value, dict) and key not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": repr(key)})
        if not isinstance(value, str | dict):
            raise PydanticKnownError("dict_type")
        tags = {"discriminator": key, "tag": str(value), "expected_tags": ""}
        raise PydanticKnownError("union_tag_invalid", tags)


@dataclass(frozen=True)
class NameIn:
    """Mark a text field that holds a name in a registry.

    Example: ``aggregation: Annotated[str, NameIn(AGGREGATIONS)]``.
    """

    registry: Registry
    of: frozenset[str] = frozenset()
    """Accept only parts whose fact ``of`` contains one of these values. Default: all parts."""

    def names(self) -> tuple[str, ...]:
        """Return the accepted names, from the current entries of the registry."""
        return tuple(
            entry.name
            for entry in self.registry
            if not self.of or self.of & frozenset(entry.facts.get("of", ()))
        )

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.literal_schema([*self.names()])


def one_of(annotation: Any) -> OneOf | None:
    """Return the marker of a field that holds sections of several kinds; None for other fields."""
    markers = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((marker for marker in markers if isinstance(marker, OneOf)), None)


def names_in(annotation: Any) -> Any:
    """Return a ``Literal`` of the accepted names if a field has ``NameIn``, else the annotation."""
    markers = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    marker = next((marker for marker in markers if isinstance(marker, NameIn)), None)
    return annotation if marker is None else Literal[marker.names()]

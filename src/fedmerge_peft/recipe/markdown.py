"""The reference of recipes as Markdown, from the JSON schema: keys, types, bounds and defaults."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fedmerge_peft.recipe.schema import Recipe

Schema = dict[str, Any]

_SHARED_BY = 4
"""Number of kinds that must share a key so that the key is listed once, before the kinds."""
_NAMES = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
}
_HEAD = """# Recipes: all keys

This page is the output of `fedmerge schema --markdown`, from the schema that checks recipes. Keys
can be set on the command line as `section.key=value`, which takes precedence over the file.
**required** marks keys without a default; a section can be omitted if all of its keys have
defaults. The recipes that come with the package (`fedmerge ls`) explain their choices in comments.
"""


def reference() -> str:
    """Return the reference: one table per section, or per kind of a section that has several."""
    schema = Recipe.model_json_schema()
    top = {"description": Recipe.__doc__, "properties": schema["properties"]}
    return "\n".join([_HEAD, *_section("", top, schema["$defs"])]).rstrip("\n") + "\n"


def _section(
    path: str, section: Schema, known: dict[str, Schema], skip: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yield the Markdown of a section: its description, its table, and the sections within it."""
    if path:
        yield _description(section) + "\n"
    yield from _table(section, known, skip)
    for key, field in section["properties"].items():
        place = f"{path}.{key}".removeprefix(".")
        kinds = _variants(field)
        if "$ref" in field:
            yield f"{'##' if not path else '###'} {place}\n"
            yield from _section(place, _of(field, known), known)
        elif kinds and key != "baselines":  # baselines have the kinds of the strategy
            yield from _kinds(place, field, [_of(kind, known) for kind in kinds], known)


def _kinds(
    path: str, field: Schema, kinds: list[Schema], known: dict[str, Schema]
) -> Iterator[str]:
    """Yield the Markdown of a section that has several kinds, with a table for each."""
    level = "##" + "#" * path.count(".")
    yield f"{level} {path}\n"
    yield _description(field) + "\n"
    tag = next(key for key, schema in kinds[0]["properties"].items() if "const" in schema)
    counts = Counter(
        json.dumps([key, schema]) for kind in kinds for key, schema in kind["properties"].items()
    )
    common = dict(json.loads(text) for text, count in counts.items() if count >= _SHARED_BY)
    if common:
        owners = [
            kind["properties"][tag]["const"]
            for kind in kinds
            if common.keys() <= kind["properties"].keys()
        ]
        yield f"Common to {', '.join(f'`{owner}`' for owner in owners)}:\n"
        yield from _table({"properties": common}, known)
    for kind in kinds:
        yield f"{level}# {tag}: {kind['properties'][tag]['const']}\n"
        yield from _section(
            path,
            kind,
            known,
            frozenset(
                {tag} | {key for key in common if kind["properties"].get(key) == common[key]}
            ),
        )


def _table(
    section: Schema, known: dict[str, Schema], skip: frozenset[str] = frozenset()
) -> Iterator[str]:
    fields = {key: field for key, field in section["properties"].items() if key not in skip}
    if not fields:
        return
    yield "| key | type | default | description |\n|---|---|---|---|"
    for key, field in fields.items():
        default = _default(field) if "default" in field else "**required**"
        # pydantic omits the description of a field if it equals that of its section
        described = field if "description" in field else _of(field, known)
        yield f"| `{key}` | {_type(field)} | {default} | {_description(described)} |"
    yield ""


def _type(field: Schema) -> str:
    """Return a field's type and bounds in words."""
    if "$ref" in field or _variants(field):
        return "a list of such sections" if field.get("type") == "array" else "a section, below"
    if "anyOf" in field:
        parts = [_type(variant) for variant in field["anyOf"]]
        return (
            _NAMES["boolean"]
            if parts[0] == _NAMES["boolean"] and "`yes`" in parts[1]
            else " / ".join(parts)
        )
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}" + (", not empty" if field.get("minItems") else "")
    if field["type"] == "object":
        return f"by name: {_type(field['additionalProperties'])}"
    return _NAMES[field["type"]] + _bounds(field)


def _bounds(field: Schema) -> str:
    """Return bounds such as `` > 0 and < 1``; an empty text if there are none."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    if field["type"] == "integer" and "exclusiveMinimum" in field:
        field = {**field, "minimum": field["exclusiveMinimum"] + 1}
        del field["exclusiveMinimum"]
    bounds = [f"{sign} {_number(field[bound])}" for bound, sign in signs.items() if bound in field]
    return " " + " and ".join(bounds) if bounds else ""


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) and bound < 10**9 else f"{bound:g}"


def _default(field: Schema) -> str:
    value = field["default"]
    if isinstance(value, dict) and value:
        return "as below"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`".replace("\n", "\\n")


def _description(section: Schema) -> str:
    return " ".join(str(section["description"]).split()).replace("|", "\\|")


def _variants(field: Schema) -> list[Schema]:
    """Return the schemas of the kinds of a field's section; [] for a field without kinds."""
    inner = [field, *field.get("anyOf", ()), *field.get("items", {}).get("anyOf", ())]
    return next((list(schema["oneOf"]) for schema in inner if "oneOf" in schema), [])


def _of(field: Schema, known: dict[str, Schema]) -> Schema:
    return known[field["$ref"].rpartition("/")[2]]

"""Every number of a recipe has bounds."""

from fedmerge_peft.recipe.schema import Recipe

CHECKED_LATER = {"layers_to_transform", "trainable_token_indices", "filter"}
"""Keys whose numbers are compared with the model or the data."""


def numbers(schema, key=""):
    """Yield the key and the schema of each number in a JSON schema."""
    if isinstance(schema, list):
        for part in schema:
            yield from numbers(part, key)
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield key, schema
        for name, fields in schema.get("properties", {}).items():
            yield from numbers(fields, name)
        for part in ("anyOf", "oneOf", "items", "additionalProperties"):
            yield from numbers(schema.get(part), key)
        for name, section in schema.get("$defs", {}).items():
            yield from numbers(section, name)


def test_every_number_has_bounds():
    found = [(k, s) for k, s in numbers(Recipe.model_json_schema()) if k not in CHECKED_LATER]
    assert len(found) > 60
    for key, schema in found:
        assert {"minimum", "exclusiveMinimum"} & schema.keys(), key
        assert {"maximum", "exclusiveMaximum"} & schema.keys(), key

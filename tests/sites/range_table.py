"""Table of all fields of messages with their ranges, from the declarations in ``sites/fields.py``.

PYTHONPATH=src:tests python -m sites.range_table
"""

from fedmerge_peft.sites import fields
from fedmerge_peft.training.hyperparameters import MAX_EPOCHS, MAX_LEARNING_RATE

KINDS = {
    "enroll": fields.Enroll,
    "enrolled": fields.Enrolled,
    "open": fields.Open,
    "opened": fields.Opened,
    "train, evaluate": fields.AssignmentFields,
    "trained": fields.TrainedFields,
    "evaluated": fields.Evaluated,
    "error": fields.Failure,
    "adapter": fields.StoreAdapter,
}


def table():
    """Return the table in Markdown."""
    lines = ["| message | field | range |", "|---|---|---|"]
    for kind, model in KINDS.items():
        schema = model.model_json_schema()
        rows = [row for row in ranges(schema, schema.get("$defs", {}), "") if row[1]]
        lines += [f"| {kind} | `{name}` | {values} |" for name, values in dict.fromkeys(rows)]
    return "\n".join(lines)


def ranges(schema, sections, name):
    """Yield the dotted name and the range of a field and of everything in it."""
    if reference := schema.get("$ref"):
        schema = sections[reference.rpartition("/")[2]]
    if name == "hyperparameters":
        yield f"{name}.learning_rate", f"above 0 to {MAX_LEARNING_RATE:g}"
        yield f"{name}.epochs", f"1 to {MAX_EPOCHS}"
        return
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from ranges(part, sections, name)
    match schema.get("type"):
        case "object" if "properties" in schema:
            for key, value in schema["properties"].items():
                yield from ranges(value, sections, f"{name}.{key}".removeprefix("."))
        case "object":
            yield name, interval(schema, "Properties", " entries")
            yield from ranges(schema.get("propertyNames", {}), sections, f"{name} (names)")
            yield from ranges(schema["additionalProperties"], sections, f"{name}[]")
        case "array":
            yield name, interval(schema, "Items", " entries")
            yield from ranges(schema["items"], sections, f"{name}[]")
        case "string":
            yield name, text(schema)
        case "integer" | "number":
            yield name, interval(schema, "imum", "")


def text(schema):
    """Return the range of a text."""
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return " or ".join(choices)
    if pattern := schema.get("pattern"):
        return f"`{pattern}`"
    return interval(schema, "Length", " characters")


def interval(schema, kind, unit):
    """Return the bounds of a number, or of a length."""
    above = schema.get("exclusiveMinimum")
    low = number(schema.get(f"min{kind}", 0)) if above is None else f"above {number(above)}"
    return f"{low} to {number(schema[f'max{kind}'])}{unit}"


def number(value):
    """Write a number of any size in a few characters."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}".replace("e+", "e")


if __name__ == "__main__":
    print(table())

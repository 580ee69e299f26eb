"""Random recipes over all sections, on tiny models and made data."""

from math import ceil, exp, floor, log

from federation.random_data import TABLES
from fedmerge_peft import Recipe, RecipeError

SCHEMA = Recipe.model_json_schema()
MODELS = {"sequence-classification": "bert", "causal-lm": "gpt2", "image-classification": "vit"}
"""Tiny model of each task."""

WORK = {
    "rounds": 3, "epochs": 2, "steps": 3, "clients": 6, "clients_per_value": 3, "passes": 2,
    "warm_passes": 2, "max_new_tokens": 4, "gradient_accumulation": 4, "levels": 4,
    "min_examples": 9, "classes_per_group": 3,
}  # fmt: skip
"""Upper bounds of keys that multiply the work, smaller than those of the schema."""
SMALL = {
    "rounds", "epochs", "steps", "clients", "batch_size", "max_new_tokens", "min_examples",
    "classes_per_group",
}  # fmt: skip
"""Keys that always have a value, because the defaults take long or need more examples."""
NEEDED = {"learning_rate", "target_modules", "by"}
"""Keys that always have a value, because the default takes long or does not exist for all."""
NAMES = {
    **{key: ["replaced"] for key in ("model", "path")},
    "by": ["team"] * 8 + ["label", "kind", "score", "absent"],
    "group": ["kind", "team", "absent"],
    "split_column": ["split"] * 5 + ["absent"],
    "text": ["text"] * 8 + ["team"],
    "text_pair": ["kind"],
    "label": ["label"] * 8 + ["team", "score"],
    **{key: [key] for key in ("image", "prompt", "completion", "messages")},
    **{key: [key] for key in ("instruction", "input", "output")},
    "class_weights": ["balanced", "balanced", None, {"absent": 2.0}],
    "template": ["{instruction}\n\n{input}\n"],
    "train_split": ["train"] * 8 + ["test"],
    "validation_split": [None, None, "test"],
    "test_split": [None, None, "test"],
    "separator": [None, None, ";"],
    "quoting": ["auto", "double"],
    "encoding": [None, "utf-8", "cp1252", "latin-1", "utf-16"],
    **{key: [None] for key in ["config", "revision", "tokenizer", "quantization", "preset"]},
    **{key: [[]] for key in ["tracking", "callbacks", "plugins"]},
    "device": ["cpu", "auto"],
    "mixed_precision": ["no", "bf16", "auto", "auto", "fp16"],
    "attention": ["eager", "sdpa", None],
    "learning_rate": [1e-3] * 6 + [1e-12, 1.0, 100.0, "auto"],
    "trust_remote_code": [False],
    "metric": ["loss", "loss", "accuracy", "perplexity"],
    "target_modules": ["all-linear"] * 24 + [None, ["query"], ["c_attn"], ".*q.*", ["absent"]],
    "exclude_modules": [["key"], ".*layer.0.*", None],
    "modules_to_save": [["LayerNorm"], ["classifier"], ["wte"], ["ln_f"], [], None],
    "target_parameters": [None, None, ["weight"]],
    "init_lora_weights": [True, "gaussian", "pissa"],
    "rank_pattern": [{}, {"query": 3}, {"c_attn": 1}, {"absent": 3}],
    "alpha_pattern": [{}, {"query": 3.0}, {".*": 1.0}],
    "layers_to_transform": [0, 1, [0, 1], [7], -1],
    "trainable_token_indices": [[5, 6], [100_000], []],
    "filter": [{"kind": "x"}, {"kind": ["x", "y"]}, {"kind": "z"}, {"score": 0.5}],
    "prefix_cache": [0.0, 1e-6, 2.0],
}  # fmt: skip
"""Values of keys that name something, or whose values depend on the machine."""


def random_recipe(random, models, data):
    """Draw a valid recipe of one of the tasks.

    Args:
        random: ``random.Random``.
        models: Folder with the tiny models.
        data: Folder with the tables.
    """
    while True:
        try:
            return Recipe.model_validate(_draw(random, models, data))
        except RecipeError:  # most conflicts of keys are reported without data and model
            continue


def _draw(random, models, data):
    share = random.choice([3, 6, 12])  # one of so many keys differs from its default
    task, model = random.choice(sorted(MODELS.items()))
    recipe = {"name": "random"}
    for key, field in SCHEMA["properties"].items():
        part = _of_task(task) if key == "task" else field
        needed = key in SMALL | {"task", "backbone", "lora", "data", "training", "strategy"}
        if key not in recipe and (needed or random.randrange(share) == 0):
            recipe[key] = value(random, key, part, share)
    recipe["backbone"]["model"] = str(models / model)
    recipe["data"]["path"] = str(data / TABLES[task])
    return recipe


def value(random, key, schema, share):
    """Draw a value of a key."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if key in NAMES:
        return random.choice(NAMES[key])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return random.choice(schema["enum"])
    if parts := schema.get("anyOf", schema.get("oneOf")):
        small = [part for part in parts if part.get("type") in ("integer", "number")]
        return value(random, key, random.choice(small if key in SMALL else parts), share)
    match schema["type"]:
        case "null":
            return None
        case "boolean":
            return random.random() < 0.5
        case "array":
            count = schema.get("minItems", 0) + random.randrange(3)
            return [value(random, "", schema["items"], share) for _ in range(count)]
        case "object":
            return section(random, schema, share)
        case "integer" | "number":
            return number(random, key, schema)
    return "absent"  # a text that names nothing


def section(random, schema, share):
    """Draw a section in which one of ``share`` keys has a value, and those that need one."""
    drawn = {}
    for key, field in schema["properties"].items():
        needed = key in {*SMALL, *NEEDED, *schema.get("required", ())} or "const" in field
        if needed or random.randrange(share) == 0:
            drawn[key] = value(random, key, field, share)
    return drawn


def number(random, key, schema):
    """Draw a number within the bounds of a schema: a usual one, one of its ends, or any."""
    open_low, open_high = "exclusiveMinimum" in schema, "exclusiveMaximum" in schema
    low = schema["exclusiveMinimum"] if open_low else schema["minimum"]
    high = schema["exclusiveMaximum"] if open_high else schema["maximum"]
    if WORK.get(key, high) < high:
        high, open_high = WORK[key], False
    if schema["type"] == "integer":
        low, high = floor(low) + open_low, ceil(high) - open_high
        usual = random.randint(low, min(high, low + 8))
        return random.choice([usual, usual, usual, usual, random.randint(low, high), high])
    between = exp(random.uniform(log(max(low, high * 1e-12)), log(high)))
    usual = random.choice([value for value in (0.01, 0.1, 0.5, 1.0, 5.0) if low < value < high])
    return random.choice([usual, usual, usual, between, high if not open_high else between])


def _of_task(task):
    kinds = SCHEMA["properties"]["task"]["anyOf"][0]["discriminator"]["mapping"]
    return {"$ref": kinds[task]}

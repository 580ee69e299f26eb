"""Made examples of tasks whose columns differ from those of text classification."""

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL.Image import fromarray

WORDS = ["parcel", "refund", "password", "laptop", "invoice", "badge", "heating"]
NAMES = ["Ada Moor", "Bo", "Cy van Dam"]


def tagged(count):
    """Sentences of different lengths with names of persons and places."""
    words, tags = [], []
    for n in range(count):
        name = NAMES[n % 3].split()
        words.append(["the", WORDS[n % 7], *["is"] * (n % 4), "of", *name, "in", "Leeds"])
        tags.append(["O"] * (3 + n % 4) + ["B-PER"] + ["I-PER"] * (len(name) - 1) + ["O", "B-LOC"])
    return Dataset.from_dict({"tokens": words, "ner_tags": tags})


def scored(count):
    """Pairs of sentences, and a number that depends on both."""
    return Dataset.from_dict(
        {
            "text": [f"the {WORDS[n % 7]} {'is late ' * (n % 4)}again" for n in range(count)],
            "other": [f"{WORDS[(n + n % 2) % 7]} again" for n in range(count)],
            "label": [n % 5 / 2 - 1 for n in range(count)],
        }
    )


def labeled(count):
    """Sentences with none, one or two of three labels."""
    sets = [[], ["joy"], ["anger", "fear"], ["fear"]]
    return Dataset.from_dict(
        {
            "text": [f"the {WORDS[n % 7]} {'is late ' * (n % 4)}again" for n in range(count)],
            "labels": [sets[n % 4] for n in range(count)],
        }
    )


def asked(count):
    """Contexts with four choices, of which the right one depends on the context."""
    return Dataset.from_dict(
        {
            "context": [f"the {WORDS[n % 7]} {'is late ' * (n % 4)}again" for n in range(count)],
            "choices": [[f"{word} again" for word in WORDS[n % 3 :][:4]] for n in range(count)],
            "label": [(n % 7 + n) % 4 for n in range(count)],
        }
    )


def pictures(count, seed=0):
    """Images of noise."""
    shape = (count, 32, 32, 3)
    return [*map(fromarray, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))]


def rated(count):
    """Images of noise, and a number for each."""
    features = Features({"image": Image(), "label": Value("float64")})
    numbers = [n % 5 / 2 - 1 for n in range(count)]
    return Dataset.from_dict({"image": pictures(count), "label": numbers}, features=features)


MADE = {
    "token-classification": tagged,
    "text-regression": scored,
    "multi-label-classification": labeled,
    "image-regression": rated,
    "multiple-choice": asked,
}
"""Functions from a number of examples to a table, by task."""
SECTIONS = {"text-regression": {"text_pair": "other"}}
"""Keys of the task's section."""
KINDS = {task: "vit" if "image" in task else "bert" for task in MADE}
"""Tiny model of each task."""


def made(task, count):
    """Return examples and the section of a task."""
    return MADE[task](count), {"name": task, **SECTIONS.get(task, {})}

"""What the tests of several ways to train share."""

import numpy as np
import pytest

WORDS = ["parcel", "refund", "password", "laptop", "invoice", "badge", "heating"]


@pytest.fixture(scope="session")
def table_and_task():
    """``table_and_task("bert", 12)``: so many examples of three classes, or of prompts and completions, and the recipe's ``task`` for them.

    Lengths differ from one example to the next. Kinds are those of the tiny models, and ``llama-classifier``.
    """
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import fromarray

    def make(kind, count):
        labels = [n % 3 for n in range(count)]
        if kind == "vit":
            noise = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            features = Features({"image": Image(), "label": Value("int64")})
            data = Dataset.from_dict(
                {"image": [fromarray(each) for each in noise], "label": labels}, features=features
            )
            return data, {"name": "image-classification"}
        if kind in ("bert", "llama-classifier"):
            texts = [f"the {WORDS[n % 7]} {'is late ' * (n % 5)}again" for n in range(count)]
            return Dataset.from_dict({"text": texts, "label": labels}), {
                "name": "sequence-classification"
            }
        pairs = {
            "prompt": [f"say {WORDS[n % 7]}" for n in range(count)],
            "completion": [" yes" * (1 + n % 5) for n in range(count)],
        }
        return Dataset.from_dict(pairs), {"name": "causal-lm"}

    return make

"""Made tables of texts, prompts and images for random recipes."""

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL.Image import fromarray

ROWS = 36
WORDS = ["where", "is", "my", "parcel", "please", "refund", "the", "second", "charge", "now"]
TABLES = {
    "sequence-classification": "tickets.csv",
    "causal-lm": "prompts.jsonl",
    "image-classification": "images.parquet",
}


def write_data(folder):
    """Write one table for each task, with columns for clients, splits and filters."""
    random = np.random.default_rng(0)
    common = {
        "label": [["bill", "ship", "other"][row % 3] for row in range(ROWS)],
        "team": [f"team {row % 4}" for row in range(ROWS)],
        "kind": [["x", "y"][row % 2] for row in range(ROWS)],
        "score": [0.5 * (row % 3) for row in range(ROWS)],
        "split": ["test" if row % 6 == 5 else "train" for row in range(ROWS)],
    }
    texts = [" ".join(random.choice(WORDS, 3 + row % 9)) for row in range(ROWS)]
    Dataset.from_dict({"text": texts, **common}).to_csv(folder / TABLES["sequence-classification"])
    answers = [text.split()[0] for text in texts]
    Dataset.from_dict({"prompt": texts, "completion": answers, **common}).to_json(
        folder / TABLES["causal-lm"]
    )
    pixels = random.integers(0, 256, (ROWS, 20, 24, 3), dtype=np.uint8)
    kinds = {key: Value("float64" if key == "score" else "string") for key in common}
    Dataset.from_dict(
        {"image": [fromarray(image) for image in pixels], **common},
        features=Features(image=Image(), **kinds),
    ).to_parquet(folder / TABLES["image-classification"])

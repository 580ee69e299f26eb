"""Examples and clients on tiny models."""

from functools import partial
from unittest import mock

import pytest

from fedmerge_peft.models import tiny
from tasks.made_examples import MADE, made, pictures
from training.prefix_bench import Bench

WORDS = ["parcel", "refund", "password", "laptop", "invoice", "badge", "heating"]


@pytest.fixture(scope="session")
def table_and_task():
    """``table_and_task("bert", 12)``: twelve examples, and the recipe's ``task`` for them.

    Examples are of three classes, or prompts and completions; their lengths differ. Kinds are those
    of the tiny models, ``llama-classifier``, and ``bert-TASK`` or ``vit-TASK`` for the tasks of
    ``MADE``, question answering and sentence embedding.
    """
    from datasets import Dataset, Features, Image, Value

    def make(kind, count):
        if kind.partition("-")[2] in MADE:
            return made(kind.partition("-")[2], count)
        texts = [f"the {WORDS[n % 7]} {'is late ' * (n % 5)}again" for n in range(count)]
        if kind == "bert-question-answering":  # of one to four windows
            answers = [{"text": ["again"], "answer_start": [text.index("again")]} for text in texts]
            columns = {"context": texts, "question": ["when"] * count, "answers": answers}
            section = {"max_length": 20, "stride": 4, "metrics": ["squad_f1"]}
            return Dataset.from_dict(columns), {"name": "question-answering", **section}
        if kind == "bert-sentence-embedding":
            columns = {"anchor": texts, "positive": [*reversed(texts)]}
            return Dataset.from_dict(columns), {"name": "sentence-embedding", "metrics": ["mrr"]}
        labels = [n % 3 for n in range(count)]
        if kind in ("vit", "resnet"):
            features = Features({"image": Image(), "label": Value("int64")})
            columns = {"image": pictures(count), "label": labels}
            data = Dataset.from_dict(columns, features=features)
            return data, {"name": "image-classification"}
        if kind in ("bert", "llama-classifier"):
            return Dataset.from_dict({"text": texts, "label": labels}), {
                "name": "sequence-classification"
            }
        pairs = {
            "prompt": [f"say {WORDS[n % 7]}" for n in range(count)],
            "completion": [" yes" * (1 + n % 5) for n in range(count)],
        }
        return Dataset.from_dict(pairs), {"name": "causal-lm"}

    return make


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory):
    """The tiny models with four layers."""
    folder = tmp_path_factory.mktemp("deep-models")
    with mock.patch.dict(tiny._WIDTH, num_hidden_layers=4):
        for kind in tiny.KINDS:
            tiny.write(kind, folder / kind)
    return folder


@pytest.fixture
def make_bench(deep_models, table_and_task):
    """``make_bench("gpt2", lora={...})``."""
    return partial(Bench, deep_models, table_and_task)

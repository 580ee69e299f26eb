"""Finished runs: one for each of the three tasks, and a small one that newcomers join."""

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image
from PIL import Image as Pictures

from fedmerge_peft import Recipe, Run, federate
from fedmerge_peft.data import load_splits
from fedmerge_peft.engines.local import LocalEngine
from serving.newcomer import recipe

SECTIONS = {
    "causal-lm": """{name: causal-lm, chat_template: "{% for m in messages %}{{ m.role + ': ' + \
m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"}"""
}
"""Sections of tasks that differ from their names: GPT-2 has no chat template of its own."""
TASKS = ("sequence-classification", "causal-lm", "image-classification")


@dataclass
class Finished:
    """A run and its engine."""

    run: Any
    engine: Any
    inputs: dict[str, Any]
    """A batch for the model, without labels."""

    def logits(self, client):
        """Logits of the client's served model, by the engine that trained it."""
        number = list(self.run.clients.index).index(client)
        soup, weights = self.run.state()
        self.engine.backbone.load_row(soup.merge(weights[number]))
        self.engine.backbone.eval()
        return self.engine.backbone.model(**self.inputs).logits.detach()


def table(task):
    words = ["my order is late", "the page shows an error", "a refund please", "it works again"]
    rows = [{"by": f"client {row % 3}"} for row in range(24)]
    for number, row in enumerate(rows):
        if task == "image-classification":
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            row |= {"image": Pictures.fromarray(pixels), "label": ["cat", "dog"][number // 3 % 2]}
        else:
            row |= {"text": f"{words[number % 4]} {number}"}
            row |= (
                {"label": ["amber", "blue"][number // 3 % 2]}
                if task == "sequence-classification"
                else {}
            )
    made = Dataset.from_list(rows)
    return made.cast_column("image", Image()) if task == "image-classification" else made


@pytest.fixture(scope="session")
def finished(tiny_models, tmp_path_factory):
    """``finished(task)``: a run of two rounds, three clients and three adapters."""
    models = {
        "sequence-classification": ("bert", "[query, value]"),
        "causal-lm": ("gpt2", "[c_attn]"),
        "image-classification": ("vit", "[q_proj, v_proj]"),
    }
    made = {}

    def run(task):
        if task not in made:
            folder = tmp_path_factory.mktemp("finished")
            DatasetDict({"train": table(task)}).save_to_disk(folder / "data")
            model, targets = models[task]
            (folder / "mine.yaml").write_text(
                f"name: mine\ntask: {SECTIONS.get(task, task)}\nrounds: 2\n"
                f"backbone: {{model: {tiny_models / model}}}\n"
                f"lora: {{r: 2, target_modules: {targets}}}\n"
                f"data:\n  path: {folder / 'data'}\n  test_fraction: 0.25\n"
                "  partition: {scheme: natural, by: by}\n"
                "strategy: {name: fedmerge, adapters: 3, start: independent}\n"
                "training: {learning_rate: 0.01, batch_size: 16, epochs: 1, device: cpu}\n"
            )
            recipe = Recipe.load(folder / "mine.yaml")
            engine = LocalEngine.from_recipe(recipe)
            batch = engine.runtime.collate(np.arange(4))
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            made[task] = Finished(federate(recipe, folder / "run", engine=engine), engine, inputs)
        return made[task]

    return run


@pytest.fixture(scope="module")
def engine():
    return LocalEngine.from_recipe(recipe())


@pytest.fixture(scope="module")
def run(tmp_path_factory, engine):
    return federate(recipe(), tmp_path_factory.mktemp("runs") / "first", engine=engine)


@pytest.fixture(scope="module")
def tickets():
    """Tickets of an organisation that is not a client."""
    return load_splits(recipe("data.filter={organisation: Fen Water}").data)["train"].select(
        range(24)
    )


@pytest.fixture
def copy(run, tmp_path):
    return Run.open(shutil.copytree(run.path, tmp_path / "run"))

"""The quality benchmark: its settings are valid recipes, and its pretrained backbones load."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge_peft import Recipe
from fedmerge_peft.engines.local import LocalEngine

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
SETTINGS = sorted(path.stem for path in QUALITY.glob("*.yaml") if path.stem != "comparison")
SMALL = [
    "--hidden",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--batch-size",
    "8",
    "--steps",
    "20",
]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_of_a_setting_has_recipes(name, monkeypatch):
    monkeypatch.syspath_prepend(QUALITY)
    from comparison import Setting

    setting = Setting(name)
    for method in setting.methods.values():
        for end in (0, -1):
            candidate = tuple(axis.values[end] for axis in method.axes)
            recipe = setting.recipe(method, candidate, seed=3)
            assert recipe.seed == 3
            assert recipe.strategy.name == method.strategy


@pytest.fixture
def pretrain(shared_data, tmp_path):
    """Run a program briefly on a part of the data; return the folder it wrote and its output."""

    def run(program, *options):
        command = [
            sys.executable,
            QUALITY / program,
            "--data",
            shared_data,
            "--out",
            tmp_path / "model",
            *SMALL,
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return tmp_path / "model", done.stdout

    return run


def engine(model, *overrides):
    lora = "lora={r: 4, target_modules: [q_proj, v_proj], layers_to_transform: [1]}"
    partition = "data.partition={scheme: iid, clients: 2}"
    return LocalEngine.from_recipe(
        Recipe.load(
            "smoke", [f"backbone.model={model}", lora, partition, "training.device=cpu", *overrides]
        )
    )


@pytest.mark.slow
def test_the_pretrained_vit_loads_without_a_head(pretrain, tmp_path):
    from datasets import Dataset
    from PIL import Image

    def png(value):
        file = io.BytesIO()
        Image.fromarray(np.full((40, 40, 3), value, dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    model, output = pretrain("pretrain_vision.py", "--rows", "200")
    assert "held-out accuracy 0." in output
    Dataset.from_dict(
        {"image": [png(value) for value in range(40)], "label": [0, 1, 2, 3] * 10}
    ).to_parquet(tmp_path / "images.parquet")
    loaded = engine(
        model,
        "task={name: image-classification, num_labels: 100}",
        f"data.path={tmp_path / 'images.parquet'}",
    )
    assert loaded.backbone.prefix is not None
    assert loaded.runtime.examples.columns["pixel_values"][0].shape == (3, 32, 32)
    head = loaded.backbone.layout.columns("head")
    assert len(head) == 100 * 32 + 100
    assert not torch.equal(loaded.backbone.fresh_row(1)[head], loaded.backbone.fresh_row(2)[head])

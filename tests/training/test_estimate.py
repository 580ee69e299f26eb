"""Memory that is estimated from a configuration alone."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedmerge_peft import Recipe, RecipeError
from fedmerge_peft.cli import main
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.models import labeled_head
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.training.estimate import _pass, estimate, load_config
from models.gguf_file import write_gguf

PROGRAM = runpy.run_path(
    str(Path(__file__).parents[2] / "benchmarks" / "memory" / "memory.py"), run_name="memory"
)


def recipe(model="tiny:llama", task="causal-lm", **changes):
    return Recipe(
        name="memory",
        task=task if isinstance(task, dict) else {"name": task},
        backbone={"model": model},
        lora={"r": 4, "target_modules": "all-linear"},
        data={"path": ".", "partition": {"scheme": "iid", "clients": 2}},
        training={"batch_size": 2, "clients_per_batch": 1, "device": "cpu"},
        evaluation={"batch_size": 4},
        **changes,
    )


def estimated(made, **options):
    return estimate(made, load_config(made.backbone), **options)


def test_sizes_are_those_of_the_loaded_model():
    made = recipe()
    found = estimated(made, length=32)
    engine = LocalEngine.from_recipe(made, {"train": _texts()})
    backbone = engine.runtime.backbone
    frozen = [each for each in backbone.model.parameters() if not each.requires_grad]
    assert found.parameters == sum(each.numel() for each in frozen)
    assert found.adapter == backbone.layout.size
    assert found.wire == 4 * found.adapter
    buffers = sum(each.numel() * each.element_size() for each in backbone.model.buffers())
    assert found.backbone == 4 * found.parameters + buffers
    assert found.adapters == 4 * 4 * found.adapter  # row, gradient, two moments of AdamW
    on_data = _pass(backbone.model, engine.runtime.task, 2, 32, None, train=True)
    # The estimate includes the attention mask that batches with padding need.
    assert on_data <= found.training < 1.1 * on_data
    assert found.total == found.backbone + found.adapters + max(found.training, found.evaluation)


def test_a_state_of_8_bits_is_a_quarter():
    plain = estimated(recipe(), length=16)
    made = recipe().replace(["training.optimizer=adamw_8bit", "training.clients_per_batch=4"])
    found = estimated(made, length=16)
    assert found.clients == 4
    # The slot and its gradient; for each client a row, two gradients and two moments of a quarter.
    assert found.adapters == int(4 * (2 + 4 * (3 + 2 / 4)) * plain.adapter)


def _texts():
    from datasets import Dataset

    return Dataset.from_dict({"text": [f"a text {number}" for number in range(8)]})


def test_no_weights_are_read(tmp_path):
    load_config(recipe().backbone).save_pretrained(tmp_path)
    made = recipe(str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))
    assert estimate(made, _config(tmp_path), length=32).parameters > 0


def test_of_a_gguf_file_only_the_metadata_are_read(tiny_models, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra gguf)")

    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny_models / "llama", tmp_path / "tiny.gguf")
    made = recipe(str(tmp_path)).replace(["backbone.gguf_file=tiny.gguf"])
    reader = gguf.gguf_reader
    fields = [name for name in reader.ReaderTensor._fields if name != "data"]

    def without_data(**values):
        return SimpleNamespace(**{name: values[name] for name in fields})

    with monkeypatch.context() as patched:
        patched.setattr(reader, "ReaderTensor", without_data)
        patched.setattr(gguf, "dequantize", lambda *_: pytest.fail("a tensor was dequantized"))
        found = estimated(made, length=32)
    assert not (tmp_path / "cache").exists()
    dequantized = _config(model_folder(made.backbone, tmp_path))
    assert found == estimate(made, dequantized, length=32)
    assert found == estimated(recipe(), length=32)


def _config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain():
    """The estimate without changes."""
    return estimated(recipe(), length=64)


@pytest.mark.parametrize(
    ("changed", "more", "less"),
    [
        ("backbone.gradient_checkpointing=true", [], ["training"]),
        ("training.clients_per_batch=3", ["adapters", "training"], []),
        ("backbone.dtype=bfloat16", [], ["backbone"]),
    ],
)
def test_settings_change_the_memory(plain, changed, more, less):
    after = estimated(recipe().replace([changed]), length=64)
    assert all(getattr(after, part) > getattr(plain, part) for part in more)
    assert all(getattr(after, part) < getattr(plain, part) for part in less)


def test_losses_in_chunks_need_less_memory(plain, monkeypatch):
    size = load_config(recipe().backbone).vocab_size
    monkeypatch.setattr(labeled_head, "CHUNK", 20 * size)
    found = estimated(recipe(), length=64)
    logits = 4 * 2 * 63 * size
    assert plain.training - found.training > logits
    assert found.evaluation == plain.evaluation


@pytest.mark.parametrize(
    ("quantization", "double", "bits"),
    [("4bit", True, 4 + 8 / 64 + 32 / 64 / 256), ("4bit", False, 4 + 32 / 64)],
)
def test_quantized_weights_have_scales(quantization, double, bits):
    """QLoRA (arXiv 2305.14314), section 3: 0.5 bits per weight for scales, or 0.127."""
    made = recipe().replace(
        [f"backbone.quantization={quantization}", f"backbone.double_quantization={double}"]
    )
    found, plain = (estimated(each, length=16, device="cuda") for each in (made, recipe()))
    config = load_config(made.backbone)
    vocabulary = config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    inside = plain.parameters - norms - vocabulary * (1 if config.tie_word_embeddings else 2)
    assert plain.backbone - found.backbone == pytest.approx(inside * (32 - bits) / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("task", "sequences"),
    [
        ({"name": "multi-label-classification"}, 1),
        ({"name": "text-regression"}, 1),
        ({"name": "question-answering"}, 1),
        ({"name": "sentence-embedding"}, 2),
        ({"name": "sentence-embedding", "negative": "other"}, 3),
        ({"name": "multiple-choice"}, 4),
        ({"name": "multiple-choice", "choices": ["a", "b"]}, 2),
    ],
)
def test_tasks_on_texts_need_the_memory_of_their_sequences(task, sequences):
    one = estimated(recipe("tiny:bert", "sequence-classification"), length=32)
    found = estimated(recipe("tiny:bert", task), length=32)
    assert found.training == pytest.approx(sequences * one.training, rel=0.1)
    assert found.evaluation == pytest.approx(sequences * one.evaluation, rel=0.1)


def test_only_texts_are_estimated():
    with pytest.raises(RecipeError, match="memory cannot be estimated for image-classification"):
        estimated(recipe("tiny:vit", "image-classification"))


def test_the_command_prints_each_part(tmp_path, capsys):
    (tmp_path / "memory.yaml").write_text(recipe().to_yaml())
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", str(tmp_path / "memory.yaml"), "--length", "16", "--device", "cuda"])
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert "tiny:llama on cuda" in out
    for part in ("backbone", "adapters", "training pass", "evaluation pass", "peak", "on the wire"):
        assert f"\n{part}" in out
    assert "2 examples of 16 tokens" in out
    assert torch.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("model", PROGRAM["MEASURED"])
def test_the_estimate_is_near_the_measured_peak(model):
    if (package := PROGRAM["PACKAGES"].get(model)) and find_spec(package) is None:
        pytest.skip(f"needs the package {package}: make test installs it")
    estimated, measured = PROGRAM["run_one"](model)
    assert estimated == pytest.approx(measured, rel=0.15)

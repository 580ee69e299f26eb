"""Exports hold all that a served model uses: plain PEFT computes the same logits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from equality import assert_near
from fedmerge_peft import AdapterSoup, Recipe
from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.data.build import FederatedData
from fedmerge_peft.data.clients import Client
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.quiet import quiet_transformers
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from models.architectures import HEADS, SPECIAL_PROCESSORS, build, config_of

WORDS = ["where", "is", "my", "parcel", "please", "refund", "the", "second", "charge", "now"]
ROWS = np.arange(4)


def table_of(task):
    """Return four examples of a task with three labels."""
    random = np.random.default_rng(0)
    if task == "image-classification":
        pixels = random.integers(0, 256, (len(ROWS), 40, 40, 3), dtype=np.uint8)
        inputs = {"image": [Image.fromarray(image) for image in pixels]}
    else:
        texts = [" ".join(random.choice(WORDS, 3 + row)) for row in range(len(ROWS))]
        inputs = {"prompt" if task == "causal-lm" else "text": texts}
    if task == "causal-lm":
        return Dataset.from_dict({**inputs, "completion": ["yes", "no", "yes", "no"]})
    return Dataset.from_dict({**inputs, "label": [0, 1, 2, 1]})


@pytest.fixture(scope="session")
def processors(tiny_models):
    """Folders of processors by task: tokens with ids below 400, or images of 32 × 32 pixels.

    Texts end with the token that configurations of ``architectures`` name as their end.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "bert")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(tiny_models / "texts")
    texts = dict.fromkeys(HEADS, tiny_models / "texts")
    return {**texts, "image-classification": tiny_models / "vit"}


def save_model(task, kind, folder):
    """Write a tiny model, whose running statistics are not those of a new one."""
    torch.manual_seed(0)
    model = build(task, config_of(kind))
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with quiet_transformers():
        model.save_pretrained(folder)


def engine_of(task, folder, processor, **lora):
    recipe = Recipe.model_validate(
        {
            "name": "export",
            "task": {"name": task},
            "backbone": {"model": str(folder), "tokenizer": str(processor)},
            "lora": {"r": 2, "target_modules": "all-linear", **lora},
            "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
            "training": {"device": "cpu", "learning_rate": 1e-2, "batch_size": 4, "epochs": 1},
        }
    )
    client = Client("a", ROWS, ROWS[:0], ROWS[:0], "")
    return LocalEngine.from_data(recipe, FederatedData(table=table_of(task), clients=[client]))


def compare_export(task, folder, processor, **lora):
    """Train one step, export, load the export, and compare the logits of single examples."""
    engine = engine_of(task, folder, processor, **lora)
    runtime, backbone = engine.runtime, engine.backbone
    start = backbone.fresh_row(0)
    row = train(runtime, engine.recipe.training, [Job(Train(start), ROWS, 0)])[0].row
    assert not torch.equal(row, start)
    soup = AdapterSoup(row[None], backbone.layout, backbone.shared)
    config = {
        k: sorted(v) if isinstance(v, set) else v for k, v in backbone.config.to_dict().items()
    }
    write_adapter(folder / "export", soup.state_dict(row), config)
    backbone.load_row(row)
    backbone.eval()
    labels = {"num_labels": 3, "ignore_mismatched_sizes": True} if runtime.task.labels else {}
    auto, _ = HEADS[task]
    with quiet_transformers():
        plain = auto.from_pretrained(folder, **labels)
        if getattr(runtime.task, "pad_token_id", None) is not None:
            plain.config.get_text_config().pad_token_id = runtime.task.pad_token_id
        plain = PeftModel.from_pretrained(plain, folder / "export").eval()
    with torch.no_grad():
        for example in ROWS:
            _, inputs = runtime.to_device(runtime.collate(np.array([example])))
            served = backbone.model(**inputs).logits
            assert_near(plain(**inputs).logits, served)


@pytest.mark.parametrize(
    ("task", "kind", "lora"),
    [
        ("image-classification", "levit", {}),
        ("sequence-classification", "distilbert", {}),
        ("sequence-classification", "bert", {"modules_to_save": ["LayerNorm"]}),
        ("sequence-classification", "modernbert", {"exclude_modules": "model.layers.0.*"}),
        ("causal-lm", "llama", {"modules_to_save": ["norm"]}),
        ("causal-lm", "gpt2", {"modules_to_save": ["wte"]}),
        ("causal-lm", "gpt2", {"trainable_token_indices": [5, 6]}),
    ],
    ids=[
        "head with running statistics",
        "head of two layers",
        "trained norms",
        "head of several layers",
        "trained norm of a decoder",
        "trained embeddings, tied",
        "trained tokens, tied",
    ],
)
def test_an_export_computes_what_the_served_model_computes(task, kind, lora, tmp_path, processors):
    save_model(task, kind, tmp_path)
    compare_export(task, tmp_path, processors[task], **lora)


def test_heads_keep_running_statistics_when_they_start_afresh(tmp_path, processors):
    save_model("image-classification", "levit", tmp_path)
    backbone = engine_of(
        "image-classification", tmp_path, processors["image-classification"]
    ).backbone
    pretrained = load_file(tmp_path / "model.safetensors")
    statistics = {key: value for key, value in backbone.shared.items() if "running_" in key}
    assert len(statistics) == 2
    backbone.fresh_row(1)
    buffers = dict(backbone.model.named_buffers())
    for key, value in statistics.items():
        name = key.removeprefix("base_model.model.")
        assert torch.equal(value, pretrained[name])
        saved = key.replace("classifier.", "classifier.modules_to_save.default.")
        assert torch.equal(buffers[saved], value)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda model, state: None, "PEFT does not restore .* when it saves the adapter and loads"),
        (lambda model, state: state["nowhere"], "PEFT cannot load the adapter .*: .*nowhere"),
    ],
    ids=["ignored", "refused"],
)
def test_an_adapter_that_peft_does_not_load_again_is_refused(
    load, message, tmp_path, processors, monkeypatch
):
    task = "sequence-classification"
    save_model(task, "bert", tmp_path)
    monkeypatch.setattr("peft.set_peft_model_state_dict", load)
    with pytest.raises(BackboneError, match=message):
        engine_of(task, tmp_path, processors[task])


def documented():
    """Return the architectures that ``docs/models.md`` lists as not exported, by task."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    section = text.partition("\n## Exports\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    listed = {task: set() for task in HEADS}
    for task, architectures, _ in rows:
        listed[task.strip(" `")] |= set(re.findall(r"`([^`]+)`", architectures))
    return listed


def test_the_documented_exceptions_are_architectures_of_transformers():
    for task, kinds in documented().items():
        assert kinds
        assert kinds <= set(HEADS[task][1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # each model has its own
@pytest.mark.parametrize(("task", "least"), list(zip(HEADS, (100, 140, 20), strict=True)))
def test_exports_of_all_architectures_hold_everything(task, least, tmp_path, processors):
    """Every architecture exports all, or is one of the documented exceptions."""
    exceptions, passed, failed = documented()[task], set(), {}
    for kind in sorted(set(HEADS[task][1]) - exceptions):
        folder = tmp_path / kind
        try:
            save_model(task, kind, folder)
            processor = processors[task]
            if kind in SPECIAL_PROCESSORS:
                processor = folder / "processor"
                SPECIAL_PROCESSORS[kind]().save_pretrained(processor)
            compare_export(task, folder, processor)
            passed.add(kind)
        except Exception as error:  # models raise arbitrary errors
            failed[kind] = f"{type(error).__name__}: {error}"
    assert not failed
    assert len(passed) >= least

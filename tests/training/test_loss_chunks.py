"""Training losses in chunks of positions: they and their gradients equal those of whole logits."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedmerge_peft import Recipe
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.models import labeled_head as models
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.labeled_head import labeled_head

CHUNK = 5
"""Positions."""
PROMPTS = ["Two and three?", "Name a colour:", "Hello", "Why?"] * 3
TEXTS = [" five", " red", " Good day to you", " So"] * 3
TABLES = {
    "causal-lm": {"prompt": PROMPTS, "completion": TEXTS},
    "preference": {
        "prompt": PROMPTS,
        "chosen": TEXTS,
        "rejected": [f"{text}, not" for text in TEXTS],
    },
}


def make_engine(task, **training):
    recipe = Recipe.model_validate(
        {
            "name": "chunks",
            "task": task,
            "backbone": {"model": "tiny:llama"},
            "lora": {"r": 2, "dropout": 0.0, "target_modules": "all-linear"},
            "data": {"path": ".", "partition": {"scheme": "iid", "clients": 2}},
            "training": {"learning_rate": 0.01, "epochs": 1, "device": "cpu", **training},
        }
    )
    return LocalEngine.from_recipe(recipe, {"train": Dataset.from_dict(TABLES[task["name"]])})


def head_of(engine):
    return engine.backbone.model.get_base_model().get_output_embeddings()


def step(engine, adapters):
    """Mean losses and gradients of a step of two micro-batches, and the positions with logits."""
    runtime, row = engine.runtime, engine.backbone.fresh_row(0)
    noise = torch.randn(adapters, len(row), generator=torch.Generator().manual_seed(0))
    rows = row + 0.1 * noise
    runtime.backbone.eval()
    one = adapters == 1
    slot = AdapterSlot(runtime.backbone, rows[0]) if one else AdapterStack(runtime.backbone, rows)
    chunks = [[np.arange(k, k + 4), np.arange(5 + k, 6 + 2 * k)] for k in range(adapters)]
    positions = []
    handle = head_of(engine).register_forward_hook(
        lambda _, __, logits: positions.append(logits[..., 0].numel())
    )
    with torch.enable_grad(), slot.applied():
        losses = accumulate(runtime, slot, chunks)
    handle.remove()
    gradient = slot.gradient.clone()
    slot.gradient.zero_()
    return losses, gradient, positions


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "task",
    [
        {"name": "causal-lm"},
        {"name": "causal-lm", "loss": "all"},
        {"name": "preference", "loss": "dpo"},
        {"name": "preference", "loss": "orpo"},
    ],
    ids=lambda task: "-".join(task.values()),
)
def test_chunks_change_neither_losses_nor_gradients(task, packing, monkeypatch):
    engine = make_engine(task, packing=packing)
    for adapters in (1, 3):
        losses, gradient, whole = step(engine, adapters)
        with monkeypatch.context() as patch:
            patch.setattr(models, "CHUNK", CHUNK * head_of(engine).out_features)
            found, other, positions = step(engine, adapters)
        assert found.dtype == other.dtype == torch.float64
        assert float((found - losses).norm() / losses.norm()) < 1e-12
        assert float((other - gradient).norm() / gradient.norm()) < 1e-12
        assert max(whole) > CHUNK
        assert max(positions) == CHUNK
        assert sum(positions) == sum(whole)


def test_chunks_have_a_bounded_number_of_logits(monkeypatch):
    layer = torch.nn.Linear(3, 10).requires_grad_(False)
    head = models.LabeledHead(layer)
    head.unchanged = True
    monkeypatch.setattr(models, "CHUNK", 45)
    assert [head.in_chunks(positions) for positions in (4, 5)] == [False, True]
    sizes = []
    layer.register_forward_hook(lambda _, __, logits: sizes.append(len(logits)))
    head.losses(torch.randn(9, 3), torch.arange(9))
    assert sizes == [4, 4, 1]


def cap(engine):
    def capped(_, __, output):
        output.logits = 30 * torch.tanh(output.logits / 30)  # as Gemma 2
        return output

    engine.backbone.model.get_base_model().register_forward_hook(capped)


def regularize(engine):
    task, plain = engine.runtime.task, engine.runtime.task.losses

    def losses(logits, labels):
        sums, counts = plain(logits, labels)
        inside = logits[:, :-1][labels[:, 1:] != -100] if logits.ndim == 3 else logits
        return sums + 0.1 * inside.logsumexp(dim=-1).square().sum(), counts  # the z-loss

    task.losses = losses


def fail_without_positions(engine):
    def check(_, __, logits):
        if not logits.numel():
            raise ValueError("no positions")

    head_of(engine).register_forward_hook(check)


@pytest.mark.parametrize("change", [cap, regularize, fail_without_positions])
def test_models_and_tasks_that_need_whole_logits_are_detected(change):
    engine = make_engine({"name": "causal-lm"})
    assert engine.runtime.head.unchanged
    change(engine)
    head = labeled_head(engine.runtime, np.arange(12))
    assert head is not None
    assert not head.unchanged

"""A model on several devices of one process (``backbone.device_map``)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models import backbone
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.models.placement import check_placement, device_map
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.training.gradients import accumulate
from training.bench import Bench

AUTO = BackboneRecipe(model="unused", device_map="auto")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parts"), [("bert", 2), ("llama", 3)])
def test_adapters_train_on_two_devices(tiny_models, kind, parts):
    """Tensors without values raise errors if their devices differ."""
    program = [sys.executable, Path(__file__).parent / "two_devices.py", tiny_models, kind]
    result = subprocess.run(program, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    *tried, devices = result.stdout.splitlines()
    assert len(tried) == parts
    assert all(line.endswith("cpu cpu") for line in tried)
    assert devices == "devices cpu second:0"


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "max_grad_norm": 1.0, "epochs": 2}])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_tensors_on_another_device_train_alike(tiny_models, monkeypatch, kind, options):
    """On one device, tensors that are treated as remote get the same values, bit for bit."""
    plain = Bench(tiny_models, kind, **options)
    monkeypatch.setattr(backbone, "is_remote", lambda tensor, device: len(tensor) < 4)
    remote = Bench(tiny_models, kind, **options)
    assert 0 < len(remote.backbone._near) < len(remote.backbone.trainable)
    assert torch.equal(plain.row, remote.row)
    assert torch.equal(plain.train().row, remote.train().row)
    scores = [bench.evaluate(plain.train().row) for bench in (plain, remote)]
    assert scores[0] == scores[1]
    steps = [[np.arange(4)], [np.arange(4, 9)]]
    gradients = []
    for bench in (plain, remote):
        stack = AdapterStack(bench.backbone, torch.stack([plain.row, 1.1 * plain.row]))
        bench.backbone.eval()
        with stack.applied():
            accumulate(bench.runtime, stack, steps)
        gradients.append(stack.gradient)
    assert torch.equal(*gradients)
    assert torch.equal(plain.backbone.fresh_row(3), remote.backbone.fresh_row(3))


def test_layers_are_distributed_over_the_gpus_of_one_process(monkeypatch):
    assert device_map(AUTO, torch.device("cpu")) is None
    assert device_map(AUTO, torch.device("cuda")) == "auto"
    assert device_map(BackboneRecipe(model="unused"), torch.device("cuda")) is None
    assert device_map(AUTO, torch.device("cuda", 1)) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackboneError, match="2 ranks run, each with its own GPU"):
        device_map(AUTO, torch.device("cuda", 0))
    assert device_map(AUTO, torch.device("cpu")) is None


def test_one_numbered_gpu_contradicts_a_device_map():
    assert AUTO.device_refusal("cuda") is None
    assert BackboneRecipe(model="unused").device_refusal("cuda:1") is None
    reason = str(AUTO.device_refusal("cuda:1"))
    assert "training.device is cuda:1; use training.device: cuda, or remove" in reason


def test_offloaded_layers_are_refused():
    model = torch.nn.Linear(2, 2)
    check_placement(model, "m")
    model.hf_device_map = {"a": 0, "b": 1}
    check_placement(model, "m")
    model.hf_device_map = {"a": 0, "b": "cpu", "c": "disk"}
    with pytest.raises(
        BackboneError, match=r"m does not fit .* [01] GPUs?, .* on the cpu and the disk;"
    ):
        check_placement(model, "m")

"""Devices and number formats."""

import pytest
import torch

from fedmerge_peft import DeviceError
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.training.accelerator import choose_device, choose_precision, make_accelerator


def test_a_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"no CUDA GPU; use training\.device=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(DeviceError, match="use auto, cpu, mps, cuda or cuda:1"):
        choose_device(device)


def test_fp16_on_a_cpu_is_refused_with_a_reason():
    with pytest.raises(DeviceError, match="fp16 needs a CUDA GPU"):
        choose_precision("fp16", torch.device("cpu"))


def test_auto_precision_is_full_precision_on_a_cpu():
    assert choose_precision("auto", torch.device("cpu")) == "no"


def test_one_process_may_change_the_precision():
    for precision in ("no", "bf16", "no"):
        accelerator = make_accelerator(TrainingRecipe(device="cpu", mixed_precision=precision))
        assert accelerator.mixed_precision == precision

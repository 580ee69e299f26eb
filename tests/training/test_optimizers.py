"""Optimizers of bitsandbytes, as far as a machine without a GPU has them."""

import sys
from types import ModuleType

import pytest
import torch

from fedmerge_peft import DeviceError
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.training import optimization
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.optimization import check_optimizer, make_optimizer, mixes_rows

OTHERS = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


@pytest.mark.parametrize("name", OTHERS)
def test_they_need_their_package_and_a_device_that_it_supports(name, monkeypatch):
    devices = "a CUDA GPU," if name.startswith("paged") else "a CUDA GPU or a CPU,"
    with pytest.raises(DeviceError, match=f"training.optimizer: {name} needs {devices}"):
        check_optimizer(name, torch.device("mps"))
    if name.startswith("paged"):
        with pytest.raises(DeviceError, match=r"use adamw(_8bit)?$"):
            make_accelerator(TrainingRecipe(device="cpu", optimizer=name))
    monkeypatch.setattr(optimization, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match=r"needs bitsandbytes: pip install"):
        check_optimizer(name, torch.device("cuda"))


@pytest.mark.parametrize("name", OTHERS)
def test_they_are_made_with_the_settings_of_the_recipe(name, monkeypatch):
    module = ModuleType("bitsandbytes.optim")
    made = type(OTHERS[name], (torch.optim.AdamW,), {})  # a stand-in with the same signature
    setattr(module, OTHERS[name], made)
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    training = TrainingRecipe(optimizer=name, learning_rate=0.01, weight_decay=0.5)
    optimizer = make_optimizer(parameter, training)
    assert type(optimizer) is made
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.5)
    assert group["params"][0] is parameter


def test_only_states_with_scales_mix_adapters():
    names = ("adamw", "sgd", *OTHERS)
    assert [name for name in names if mixes_rows(name)] == ["adamw_8bit", "paged_adamw_8bit"]

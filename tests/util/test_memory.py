"""A soup that does not fit into memory is refused with both sizes, before it is allocated."""

import pytest
import torch

from fedmerge_peft import AdapterLayout, BackboneError, RecipeError
from fedmerge_peft.strategies import StrategyContext, make_strategy
from fedmerge_peft.testing import strategy_recipe
from fedmerge_peft.util import memory


def test_memory_is_that_of_this_machine():
    assert 10**6 < memory.available_memory() < 10**15


def test_a_shortage_has_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 10**9)
    assert memory.shortage(10**9) is None
    assert memory.shortage(2 * 10**9) == "need 8.0 GB of memory, but 4.0 GB are available"


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, "adapters") for name in ("fedmerge", "ifca", "fesem", "flhc", "fedlease", "fedem")]
    + [("femam", "clusters")],
)
def test_soups_that_do_not_fit_are_refused_before_they_are_made(name, key, monkeypatch):
    layout = AdapterLayout.from_tensors([("a.lora_A.weight", (2, 3), "lora")])
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 6 * 999)

    def fresh_row(number):
        raise AssertionError("an adapter was made")

    context = StrategyContext(5, layout, fresh_row)
    with pytest.raises(RecipeError, match=rf"strategy.{key}: .*\(1000 of 6 numbers each\) need"):
        make_strategy(strategy_recipe(name, **{key: 1000}), context)


@pytest.mark.parametrize("name", ["local", "ditto", "fedavg_ft", "fedalt", "feddpa", "femam"])
def test_adapters_of_all_clients_that_do_not_fit_are_refused(name, monkeypatch):
    layout = AdapterLayout.from_tensors(
        [("a.lora_A.weight", (4, 3), "lora"), ("a.lora_B.weight", (3, 4), "lora")]
    )
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 24 * 50)
    many, few = (StrategyContext(m, layout, lambda _: torch.zeros(24)) for m in (100, 10))
    make_strategy(strategy_recipe(name), few)
    with pytest.raises(RecipeError, match=rf"{name} keeps .* 24 numbers for each client \(100"):
        make_strategy(strategy_recipe(name), many)


def test_ranks_that_do_not_fit_are_refused(make_backbone, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(BackboneError, match=r"lora.r: the factors of rank 4096 need 0.0 GB"):
        make_backbone("bert", {"r": 4096, "target_modules": ["query"]})


@pytest.mark.parametrize(
    "narrowed",
    [
        {"layers_to_transform": [0]},
        {"exclude_modules": ["value"]},
        {"rank_pattern": {"value": 1}},
    ],
    ids=str,
)
def test_an_adapter_of_few_of_the_named_modules_is_not_refused(
    narrowed, make_backbone, monkeypatch
):
    targets = {"r": 4, "target_modules": ["query", "value"]}
    numbers = sum(entry.size for entry in make_backbone("bert", targets).layout.entries)
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * numbers // 2)
    with pytest.raises(BackboneError, match=r"lora.r: the factors of rank 4 need"):
        make_backbone("bert", targets)
    make_backbone("bert", targets | narrowed)

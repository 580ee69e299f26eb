"""A soup in bfloat16 or on disk learns what a float32 soup in memory does."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from equality import assert_near
from fedmerge_peft import AdapterSoup, Recipe, RecipeError
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.strategies import FedMergeRecipe
from fedmerge_peft.strategies import Reply, make_strategy
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.differential_privacy import PrivateAggregator
from fedmerge_peft.strategies.saved_state import SavedState
from fedmerge_peft.testing import strategy_recipe
from fedmerge_peft.util import row_storage

SIZES = [10, 30, 20, 5, 15, 25, 10]
SOUPS = [
    {"dtype": dtype, "storage": storage}
    for dtype in ("float32", "bfloat16")
    for storage in ("memory", "disk")
][1:]
SETTINGS = [
    {"adapters": 3, "start": "independent"},
    {"adapters": 3, "start": "independent", "rule": "gradient", "server_lr": 0.5},
    {"adapters": 3, "start": "independent", "rule": "paper"},
    {"adapters": 3, "start": "independent", "rule": "adam", "weights_columns": "head"},
    {"adapters": 3, "start": "warm", "warm_rounds": 2, "own_head": True},
    {"start": "warm", "warm_rounds": 2},
    {"start": "warm", "warm_rounds": 2, "rule": "gradient", "groups": 2},
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 columns of three rows."""
    monkeypatch.setattr(row_storage, "CHUNK_BYTES", 200)


def after_four_rounds(formulas, **settings):
    federation = formulas(len(SIZES), sizes=SIZES)
    strategy = federation.strategy("fedmerge", **settings)
    for cohort in (range(5), [0, 1, 2, 3, 4], range(7), [1, 2, 4, 6]):  # two clients join late
        federation.round(strategy, cohort)
    return strategy


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_soup_on_disk_equals_one_in_memory_up_to_rounding(formulas, settings):
    memory = after_four_rounds(formulas, **settings)
    disk = after_four_rounds(formulas, **settings, soup={"storage": "disk"})
    assert row_storage.on_disk(disk.soup.rows)
    assert_near(disk.soup.rows, memory.soup.rows)
    assert_near(disk.weights, memory.weights)
    for client in range(len(SIZES)):
        assert_near(disk.adapter(client), memory.adapter(client))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_soup_in_bfloat16_is_near_one_in_float32_and_sends_float32(formulas, settings):
    full = after_four_rounds(formulas, **settings)
    half = after_four_rounds(formulas, **settings, soup={"dtype": "bfloat16"})
    assert half.soup.rows.dtype == torch.bfloat16
    assert_near(half.soup.rows.float(), full.soup.rows.to(torch.bfloat16))
    for client in range(len(SIZES)):
        assert half.adapter(client).dtype == torch.float32
        assert_near(half.adapter(client), full.adapter(client).to(torch.bfloat16))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_disk_changes_no_bit_of_a_soup_in_bfloat16(formulas, settings):
    memory, disk = (
        after_four_rounds(formulas, **settings, soup={"dtype": "bfloat16", "storage": storage})
        for storage in ("memory", "disk")
    )
    assert torch.equal(disk.soup.rows, memory.soup.rows)
    assert torch.equal(disk.weights, memory.weights)


def test_a_merged_adapter_is_the_weighted_sum_in_float32(formulas):
    strategy = after_four_rounds(formulas, **SETTINGS[0], soup={"dtype": "bfloat16"})
    expected = strategy.weights @ strategy.soup.rows.float()
    torch.testing.assert_close(strategy.soup.merge(strategy.weights), expected)


def test_rounds_of_small_steps_move_the_soup_as_far_as_in_float32(formulas, monkeypatch):
    federation = formulas(1)

    def moved(soup):
        strategy = federation.strategy("fedmerge", adapters=1, start="independent", soup=soup)
        strategy.soup = strategy.soup.with_rows(torch.ones(1, federation.layout.size), 1)
        step = torch.full((1, federation.layout.size), 1e-3)
        for _ in range(200):
            strategy.update([Reply(0, step, 10, 1.0, 0.0)])
        return float((1 - strategy.soup.rows.float()).mean())

    assert abs(moved({"dtype": "float32"}) - 0.2) < 1e-4
    assert abs(moved({"dtype": "bfloat16"}) - 0.2) < 0.05
    monkeypatch.setattr(
        row_storage.StochasticRounding, "round", lambda self, values: values.bfloat16()
    )
    assert moved({"dtype": "bfloat16"}) == 0


def test_equal_adapters_get_no_step_of_their_weights_from_rounding(formulas):
    federation = formulas(4)
    strategy = federation.strategy(
        "fedmerge", adapters=3, start="identical", soup={"dtype": "bfloat16"}
    )
    for _ in range(3):
        federation.round(strategy)
    assert torch.equal(strategy.soup.rows, strategy.soup.rows[:1].expand(3, -1))
    assert torch.equal(strategy.weights, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("soup", SOUPS, ids=str)
def test_a_failed_round_leaves_the_soup_of_the_last(formulas, soup):
    federation = formulas(4)
    settings = {"adapters": 3, "start": "independent", "soup": soup}
    strategy, again = (federation.strategy("fedmerge", **settings) for _ in range(2))
    federation.round(strategy)
    saved, before = SavedState.of(strategy), strategy.soup.rows.clone()
    bad = torch.full((1, federation.layout.size), 3e38)
    strategy.update([Reply(client, bad * (-1) ** client, 10, 1.0, 0.0) for client in range(4)])
    assert saved.fault_of_next(strategy) is not None
    saved.restore(again)
    assert again.soup.rows.dtype == before.dtype
    assert row_storage.on_disk(again.soup.rows) == (soup["storage"] == "disk")
    assert torch.equal(again.soup.rows, before)
    assert saved.fault_of_next(again) is None


@pytest.mark.parametrize("soup", SOUPS, ids=str)
def test_a_value_that_is_not_finite_is_noticed(formulas, soup):
    federation = formulas(4)
    strategy = federation.strategy("fedmerge", adapters=3, start="independent", soup=soup)
    saved, rows = SavedState.of(strategy), strategy.soup.rows.clone()
    rows[2, -1] = torch.nan
    strategy.soup = strategy.soup.with_rows(rows, 3)
    assert saved.fault_of_next(strategy) == "the soup would not be finite"


@pytest.mark.parametrize("soup", SOUPS, ids=str)
def test_a_saved_soup_is_read_back_in_float32_or_as_it_was(formulas, soup, tmp_path):
    strategy = after_four_rounds(formulas, **SETTINGS[0], soup=soup)
    strategy.soup.save(tmp_path / "soup.safetensors")
    stored = AdapterSoup.load(tmp_path / "soup.safetensors", as_stored=True)
    assert stored.rows.dtype == strategy.soup.rows.dtype
    assert torch.equal(stored.rows, strategy.soup.rows)
    assert torch.equal(AdapterSoup.load(tmp_path / "soup.safetensors").rows, stored.rows.float())
    assert "3 adapters of" in strategy.soup._repr_html_()


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"server_optimizer": "adam"}, "server_optimizer: adam"),
        ({"server_momentum": 0.5}, "server_momentum: 0.5"),
        ({"head": "private"}, "head: private"),
        ({"blocks": "layers"}, "blocks: layers"),
        ({"reseed_after": 3}, "reseed_after: 3"),
    ],
)
@pytest.mark.parametrize("soup", SOUPS, ids=str)
def test_settings_that_need_whole_rows_are_refused(soup, settings, fault):
    FedMergeRecipe(name="fedmerge", **settings)
    with pytest.raises(RecipeError, match=f"cannot be combined with {fault}; remove one of them"):
        FedMergeRecipe(name="fedmerge", soup=soup, **settings)


@pytest.mark.parametrize("soup", SOUPS, ids=str)
@pytest.mark.parametrize(
    ("aggregator", "fault"),
    [
        (Aggregator(RobustnessRecipe(aggregation="krum")), "krum needs whole updates"),
        (
            PrivateAggregator(PrivacyRecipe(mode="central", noise=1.0, clip=1.0), 4, 0),
            "noise on the sum of updates needs a float32 soup in memory",
        ),
    ],
    ids=["krum", "central privacy"],
)
def test_aggregations_that_need_whole_rows_are_refused(formulas, soup, aggregator, fault):
    context = replace(formulas(4).strategy_context(), aggregator=aggregator)
    with pytest.raises(RecipeError, match=fault):
        make_strategy(strategy_recipe("fedmerge", start="independent", soup=soup), context)


@pytest.mark.parametrize("soup", SOUPS, ids=str)
@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["robustness.aggregation=krum"], "krum needs whole updates"),
        (["privacy.mode=central"], "noise on the sum of updates needs a float32 soup in memory"),
    ],
    ids=["krum", "central privacy"],
)
def test_a_recipe_with_such_an_aggregation_is_refused_before_data_are_loaded(soup, settings, fault):
    settings = ["strategy.start=independent", *settings]
    Recipe.load("smoke", settings)
    with pytest.raises(RecipeError, match=fault):
        Recipe.load("smoke", [*settings, *(f"strategy.soup.{key}={soup[key]}" for key in soup)])


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_rules_for_single_columns_work_in_chunks(formulas, aggregation):
    def rows(**more):
        federation = formulas(5)
        recipe = strategy_recipe("fedmerge", start="independent", adapters=2, **more)
        aggregator = Aggregator(RobustnessRecipe(aggregation=aggregation, norm_bound=1.0))
        context = replace(federation.strategy_context(), aggregator=aggregator)
        strategy = make_strategy(recipe, context)
        federation.round(strategy)
        return strategy.soup.rows

    assert_near(rows(soup={"storage": "disk"}), rows())


# ---- memory --------------------------------------------------------------------------------------

_ROUNDS = """
import re, sys
from pathlib import Path
import torch
from fedmerge_peft import AdapterLayout
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.testing import strategy_recipe
from fedmerge_peft.strategies.saved_state import SavedState
from fedmerge_peft.util import row_storage

row_storage.CHUNK_BYTES = 2**20
SIZE, folder = 2**17, Path(sys.argv[1])
layout = AdapterLayout.from_tensors([("a.lora_A.weight", (SIZE // 8, 8), "lora")])
rows = lambda number: torch.full((SIZE,), 1.0 + number)
context = StrategyContext(2, layout, rows, folder=folder)


def megabytes(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak(adapters):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = megabytes("VmRSS")
    recipe = strategy_recipe(
        "fedmerge", adapters=adapters, start="independent", soup={"storage": "disk"}
    )
    strategy = make_strategy(recipe, context)
    saved = SavedState.of(strategy)
    replies = [Reply(c, 0.1 * strategy.plan(c).sent, 10, 1.0, 0.0) for c in range(2)]
    strategy.update(replies)
    assert saved.fault_of_next(strategy) is None
    strategy.soup.save(folder / "soup.safetensors")
    return megabytes("VmHWM") - before


peak(4)  # memory that the libraries need in any case
print(peak(256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_a_round_with_a_soup_of_128_megabytes_on_disk_needs_16_of_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _ROUNDS, tmp_path],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "soup.safetensors").stat().st_size > 2**27
    assert float(done.stdout) < 16

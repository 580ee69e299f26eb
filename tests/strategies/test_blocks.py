"""Merging weights by block of an adapter's columns."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from equality import assert_near
from federation.small_recipe import recipe
from fedmerge_peft import (
    AdapterLayout,
    RunError,
    concat,
    export_soup,
    federate,
    fedmerge_step,
    write_report,
)
from fedmerge_peft.adapters.blocks import Blocks
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.runs.checkpoint import Checkpoint
from fedmerge_peft.strategies import make_strategy
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.testing import FormulaClients, strategy_recipe

CLIENTS = 8
LAYOUT = AdapterLayout.from_tensors(
    [
        ("model.layer.0.query.lora_A.weight", (2, 3), "lora"),
        ("model.layer.0.query.lora_B.weight", (3, 2), "lora"),
        ("model.layer.0.value.lora_A.weight", (2, 3), "lora"),
        ("model.layer.0.value.lora_B.weight", (3, 2), "lora"),
        ("model.layer.1.query.lora_A.weight", (2, 3), "lora"),
        ("model.layer.1.query.lora_B.weight", (3, 2), "lora"),
        ("pooler.weight", (3, 3), "head"),
        ("head.weight", (2, 3), "head"),
        ("head.bias", (2,), "head"),
    ]
)
LORA, HEAD = 36, 17


@pytest.fixture
def clients():
    return FormulaClients(CLIENTS, LAYOUT)


def make(clients, name="fedmerge", **settings):
    return make_strategy(strategy_recipe(name, **settings), clients.strategy_context())


def play(strategy, clients, rounds):
    for _ in range(rounds):
        strategy.update([clients.reply(c, strategy.plan(c)) for c in range(CLIENTS)])


# ---- the blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("head", [0] * LORA + [1] * HEAD),
        ("layers", [0] * 24 + [1] * 12 + [2] * HEAD),
        ("modules", [0] * 12 + [1] * 12 + [2] * 12 + [3] * HEAD),
        ("classes", [0] * (LORA + 9) + [1] * 3 + [2] * 3 + [1, 2]),
    ],
)
def test_blocks_of_a_layout(kind, expected):
    blocks = Blocks.create(kind, LAYOUT)
    assert blocks.of.tolist() == expected
    assert len(blocks) == max(expected) + 1
    assert [len(columns) for columns in blocks.columns] == torch.bincount(blocks.of).tolist()


def test_an_adapter_of_one_block_is_refused():
    layout = AdapterLayout.from_tensors([("layer.0.query.lora_A.weight", (2, 3), "lora")])
    for kind in ("head", "layers", "modules", "classes"):
        with pytest.raises(
            RecipeError, match=rf"strategy.blocks: the kind {kind} leaves .* in one block"
        ):
            make(FormulaClients(CLIENTS, layout), blocks=kind)


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.equality
@pytest.mark.parametrize("kind", ["head", "layers", "classes"])
def test_each_block_takes_the_step_of_fedmerge_in_its_columns(clients, kind):
    strategy = make(clients, blocks=kind, start="independent", adapters=3, weights_lr=0.7)
    blocks = Blocks.create(kind, LAYOUT)
    rows = strategy.soup.rows.clone()
    logits = [torch.zeros(CLIENTS, 3) for _ in range(len(blocks))]
    for _ in range(3):
        sent = torch.empty(CLIENTS, LAYOUT.size)
        for columns, own in zip(blocks.columns, logits, strict=True):
            sent[:, columns] = torch.softmax(own, dim=1) @ rows[:, columns]
        deltas = sent - clients.centers
        play(strategy, clients, 1)
        for block, columns in enumerate(blocks.columns):
            rows[:, columns], logits[block] = fedmerge_step(
                rows[:, columns], logits[block], deltas[:, columns], clients.sizes, weights_lr=0.7
            )
        assert_near(strategy.soup.rows, rows)
    mean = sum(
        float(share) * torch.softmax(own, dim=1)
        for share, own in zip(blocks.shares, logits, strict=True)
    )
    assert_near(strategy.weights, mean)


def test_two_adapters_serve_four_kinds_of_clients_if_body_and_head_are_grouped_apart(clients):
    body, head = torch.arange(CLIENTS) % 2, torch.arange(CLIENTS) // 4
    clients.centers[:, :LORA] = clients.centers[body, :LORA]
    clients.centers[:, LORA:] = clients.centers[head, LORA:]
    kinds = {tuple(row) for row in clients.centers.tolist()}
    assert len(kinds) == 4

    def distance(**settings):
        strategy = make(clients, warm_rounds=1, adapters=2, weights_lr=1e-4, **settings)
        play(strategy, clients, 30)
        served = torch.stack([strategy.adapter(client) for client in range(CLIENTS)])
        return float((served - clients.centers).norm() / clients.centers.norm())

    assert distance(blocks="head") < 1e-3
    assert distance(own_head=False) > 0.3


def test_clients_that_come_later_join_a_group_in_each_block(clients):
    clients.centers[:, :LORA] = clients.centers[torch.arange(CLIENTS) % 2, :LORA]
    clients.centers[:, LORA:] = clients.centers[torch.arange(CLIENTS) // 2 % 2, LORA:]
    strategy = make(clients, blocks="head", warm_rounds=1, adapters=2)
    present = range(CLIENTS - 2)
    strategy.update([clients.reply(c, strategy.plan(c)) for c in present])
    strategy.update([clients.reply(c, strategy.plan(c)) for c in range(CLIENTS)])
    chosen = strategy.by_block.weights().argmax(dim=2)  # (m, B)
    assert chosen[6:].tolist() == chosen[2:4].tolist()
    assert len({tuple(row) for row in chosen.tolist()}) == 4


# ---- what a saved soup has -----------------------------------------------------------------------


@pytest.mark.equality
@pytest.mark.parametrize("settings", [{}, {"head": "private"}], ids=["shared", "private"])
def test_a_saved_soup_merges_what_the_strategy_serves(clients, tmp_path, settings):
    strategy = make(clients, blocks="layers", start="independent", adapters=3, **settings)
    play(strategy, clients, 3)
    strategy.soup.save(tmp_path / "soup.safetensors")
    soup = AdapterSoup.load(tmp_path / "soup.safetensors")
    served = torch.stack([strategy.served(client) for client in range(CLIENTS)])
    assert_near(soup.merge(strategy.weights, torch.eye(CLIENTS)), served)
    two = torch.zeros(CLIENTS)
    two[:2] = 0.5
    assert_near(soup.merge(two @ strategy.weights, two), served[:2].mean(dim=0))
    if not settings:
        plain = soup.merge(strategy.weights)
        assert_near(plain, strategy.weights @ soup.rows)
        assert float((plain - served).norm()) > 0.01 * float(served.norm())


@pytest.mark.parametrize("damage", ["columns", "range", "adapters", "finite"])
def test_damaged_blocks_of_a_soup_are_reported(clients, tmp_path, damage):
    strategy = make(clients, blocks="layers", start="independent", adapters=3)
    play(strategy, clients, 1)
    blocks = strategy.soup.blocks
    wrong = {
        "columns": replace(blocks, blocks=Blocks(blocks.blocks.of[:-1])),
        "range": replace(blocks, blocks=Blocks(blocks.blocks.of + 2**62)),
        "adapters": replace(blocks, offsets=blocks.offsets[..., :-1]),
        "finite": replace(blocks, offsets=blocks.offsets * torch.nan),
    }[damage]
    replace(strategy.soup, blocks=wrong).save(tmp_path / "soup.safetensors")
    with pytest.raises(RunError, match=r"soup.safetensors.*not a soup \(its"):
        AdapterSoup.load(tmp_path / "soup.safetensors")


@pytest.mark.equality
def test_the_exact_average_has_the_weights_of_each_block(clients):
    strategy = make(clients, blocks="modules", start="independent", adapters=3)
    play(strategy, clients, 2)
    weights = strategy.by_block.weights()[1]
    config = {"r": 2, "lora_alpha": 4}
    own = torch.eye(CLIENTS)[1]
    state, _ = concat(strategy.soup, strategy.weights[1], config, own)
    rows = [LAYOUT.state_dict(row) for row in strategy.soup.rows]
    for block, module in enumerate(("0.query", "0.value", "1.query")):
        a, b = (f"model.layer.{module}.lora_{factor}.weight" for factor in "AB")
        expected = sum(
            weight * row[b] @ row[a]
            for weight, row in zip(weights[block].tolist(), rows, strict=True)
        )
        assert_near(state[b] @ state[a], expected)


def test_a_restored_strategy_goes_on_as_if_it_had_never_stopped(clients, tmp_path):
    settings = {"blocks": "layers", "warm_rounds": 2, "adapters": 2, "server_momentum": 0.5}
    whole = make(clients, **settings)
    play(whole, clients, 3)
    whole.soup.save(tmp_path / "soup.safetensors")
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in whole.state_dict().items()
    }
    again = make(clients, **settings)

    class Manifest:
        counters = {}

    saved = AdapterSoup.load(tmp_path / "soup.safetensors")
    Checkpoint(Manifest, tmp_path, saved, state).restore(again)
    for strategy in (whole, again):
        play(strategy, clients, 2)
    assert torch.equal(again.soup.rows, whole.soup.rows)
    assert torch.equal(again.adapter(0), whole.adapter(0))


# ---- runs and refusals ---------------------------------------------------------------------------


def test_a_run_serves_predicts_and_exports_its_clients_by_block(tmp_path):
    run = federate(recipe("strategy.blocks=modules"), tmp_path / "run")
    soup, weights = run.state()
    assert soup.blocks is not None
    name = run.client_names[1]
    expected = soup.merge(weights, torch.eye(len(weights)))[1]
    assert_near(run.client(name).row, expected)
    assert_near(soup.layout.row(run.adapter(name)), expected)
    mixed = run.merge({name: 0.5, run.client_names[0]: 0.5}).row
    assert_near(mixed, (expected + run.client(run.client_names[0]).row) / 2)
    with pytest.raises(RunError, match="merging weights differ between blocks"):
        export_soup(run, tmp_path / "soup")
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Weights differ between blocks of the adapter (modules)" in page


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "paper"},
        {"rule": "gradient"},
        {"weights_columns": "head"},
        {"own_head": True},
        {"balance_rounds": 3},
        {"reseed_after": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_go_with_blocks_are_refused(settings):
    key = next(iter(settings))
    with pytest.raises(ValidationError, match=f"by block cannot be combined with {key}"):
        strategy_recipe("fedmerge", blocks="head", **settings)


def test_robust_rules_and_central_privacy_refuse_blocks(clients):
    settings = strategy_recipe("fedmerge", blocks="head", start="independent")
    robust = replace(
        clients.strategy_context(),
        aggregator=Aggregator(RobustnessRecipe(aggregation="median")),
    )
    with pytest.raises(RecipeError, match=r"strategy.blocks: merging by block does not support"):
        make_strategy(settings, robust)
    assert "blocks" in settings.privacy_refusal("central")
    assert settings.privacy_refusal("local") is None

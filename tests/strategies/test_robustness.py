"""Robust aggregation, and the influence of one client on the others."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equality import assert_near
from fedmerge_peft import AdapterLayout, Callback, RecipeError, federate, resume
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.strategies import FedAvgRecipe, FedMergeRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.strategies.aggregation import (
    Aggregator,
    clipped,
    cosine_filter_weights,
    krum_weights,
    trimmed_means,
)

pytestmark = pytest.mark.equality

RULES = ["median", "trimmed_mean", "krum", "multi_krum", "cosine_filter", "similarity_filter"]
SIZE = 12
LAYOUT = AdapterLayout.from_tensors(
    [("a.lora_A.weight", (2, 3), "lora"), ("head.weight", (2, 3), "head")]
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(clients=4):
    return StrategyContext(clients, LAYOUT, lambda k: random(SIZE, seed=k), seed=1)


def replies(clients):
    return [Reply(client, 0.1 * random(1, SIZE, seed=client), 10, 1.0, 0.0) for client in clients]


def even(count):
    return torch.full((count, 1), 1 / count, dtype=torch.float64)


def aggregator(**settings):
    return Aggregator(RobustnessRecipe(**settings))


# ---- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10])
def test_with_equal_weights_the_median_is_the_coordinate_wise_median(count):
    deltas = random(count, 40)
    found = trimmed_means(deltas, even(count), 0.5)
    np.testing.assert_allclose(found[0], np.median(deltas.numpy(), axis=0), rtol=1e-6)


@pytest.mark.parametrize(("count", "trim"), [(10, 0.1), (10, 0.3), (5, 0.2), (5, 0.4), (7, 0.0)])
def test_with_equal_weights_the_trimmed_mean_is_that_of_yin_et_al(count, trim):
    deltas, cut = random(count, 40), round(trim * count)
    expected = deltas.sort(dim=0).values[cut : count - cut].mean(dim=0)
    assert_near(trimmed_means(deltas, even(count), trim)[0], expected)


@pytest.mark.parametrize("trim", [0.1, 0.25, 0.5])
def test_a_weight_of_three_equals_three_clients(trim):
    deltas, times = random(6, 40), torch.tensor([1, 3, 1, 2, 1, 2])
    weights = (times.double() / times.sum())[:, None]
    repeated = deltas.repeat_interleave(times, dim=0)
    assert_near(trimmed_means(deltas, weights, trim), trimmed_means(repeated, even(10), trim))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("count", [3, 5, 8])
def test_krum_keeps_the_updates_with_the_nearest_neighbors(count, several):
    deltas, hostile = random(count, 6), math.floor(0.3 * count)
    scores = []
    for i in range(count):
        squares = sorted(
            float((deltas[i] - deltas[k]).square().sum()) for k in range(count) if k != i
        )
        scores.append(sum(squares[: max(1, count - hostile - 2)]))
    best = sorted(range(count), key=scores.__getitem__)[: count - hostile if several else 1]
    expected = torch.zeros(count, dtype=torch.float64)
    expected[best] = 1 / len(best)
    torch.testing.assert_close(krum_weights(deltas, even(count)[:, 0], 0.3, several), expected)


def test_krum_considers_the_users_of_an_adapter_alone():
    deltas = torch.cat([random(4, 6), 50 + random(8, 6)])
    weights = torch.cat([torch.full((4,), 0.2), torch.full((8,), 0.025)]).double()
    assert krum_weights(deltas, weights, 0.2, False).argmax() < 4
    assert krum_weights(deltas, weights, 0.2, True)[4:].sum() == 0


def test_the_cosine_filter_leaves_out_updates_opposed_to_the_others():
    common = random(1, 40)
    deltas = torch.cat([common + 0.5 * random(7, 40, seed=1), -100 * common, 0 * common])
    found = aggregator(aggregation="cosine_filter").combine(
        deltas, torch.ones(9, 1), torch.ones(9)
    )[0]
    assert_near(found, deltas[:7].mean(dim=0))


def test_a_client_has_no_vote_on_itself_in_the_cosine_filter():
    between = torch.tensor([[1.0, -0.1, -0.1], [-0.1, 1.0, 0.5], [-0.1, 0.5, 1.0]]).double()
    found = cosine_filter_weights(between, torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64))
    # it has nearly all of the weight: the other two are not users, and have no vote
    assert found.tolist() == [0.9, 0.05, 0.05]
    torch.testing.assert_close(
        cosine_filter_weights(between, torch.tensor([0.5, 0.25, 0.25]).double()),
        torch.tensor([0.0, 0.5, 0.5]).double(),
    )


@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_every_rule_returns_an_update_common_to_all_clients(rule):
    one = random(1, 30)
    mixing = random(7, 3).abs()
    found = aggregator(aggregation=rule).combine(
        one.expand(7, 30), mixing, torch.full((7,), 2.0), normalize=False
    )
    assert_near(found, mixing.mean(dim=0)[:, None] * one)


@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_an_adapter_that_nobody_uses_does_not_move(rule):
    mixing = torch.tensor([[0.5, 0.0]]).expand(4, 2)
    assert not aggregator(aggregation=rule).combine(random(4, 9), mixing, torch.ones(4))[1].any()


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@settings(max_examples=100, deadline=None)
@given(st.integers(3, 12), st.floats(-1e30, 1e30), st.integers(0, 1000))
def test_a_minority_cannot_leave_the_range_of_the_honest_clients(rule, count, value, seed):
    hostile = (count - 1) // 2
    deltas = random(count, 5, seed=seed)
    deltas[:hostile] = value
    found = aggregator(aggregation=rule, trim=0.49).combine(deltas, even(count), torch.ones(count))[
        0
    ]
    honest = deltas[hostile:]
    assert bool((found >= honest.min(dim=0).values - 1e-5).all())
    assert bool((found <= honest.max(dim=0).values + 1e-5).all())


@pytest.mark.parametrize("rule", RULES)
@given(st.permutations(range(7)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_clients_does_not_matter(rule, order):
    deltas, mixing = random(7, 12), random(7, 2, seed=1).abs()
    rule, sizes = aggregator(aggregation=rule), torch.ones(7)
    shuffled = rule.combine(deltas[list(order)], mixing[list(order)], sizes)
    torch.testing.assert_close(shuffled, rule.combine(deltas, mixing, sizes))


def test_sorting_a_part_of_the_columns_at_a_time_changes_nothing(monkeypatch):
    deltas, weights = random(5, 100), even(5)
    whole = trimmed_means(deltas, weights, 0.3)
    monkeypatch.setattr("fedmerge_peft.strategies.aggregation._SORT_COLUMNS", 7)
    assert torch.equal(trimmed_means(deltas, weights, 0.3), whole)


# ---- norms ---------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_no_update_is_longer_than_the_bound_and_short_ones_are_unchanged(bound, seed):
    deltas = torch.logspace(-4, 4, 6)[:, None] * random(6, 8, seed=seed)
    short = clipped(deltas, bound)
    assert bool((short.norm(dim=1) <= bound * (1 + 1e-5)).all())
    stays = deltas.double().norm(dim=1) <= bound
    assert torch.equal(short[stays], deltas[stays])
    torch.testing.assert_close(
        torch.nn.functional.normalize(short), torch.nn.functional.normalize(deltas)
    )


def test_the_bound_is_the_lesser_of_a_fixed_one_and_a_multiple_of_the_running_median():
    of = aggregator(norm_multiple=2.0, norm_bound=7.0)
    for length, bound in [(1.0, 2.0), (3.0, 4.0), (100.0, 6.0), (100.0, 7.0)]:
        of.clip(torch.full((3, 1), length))
        assert of.bound == bound
    for _ in range(5):
        of.clip(torch.full((3, 1), 0.5))
    assert of.bound == 1.0  # the median forgets
    assert aggregator().bound == math.inf


def test_reported_update_norms_are_those_after_clipping():
    rule, deltas = (
        aggregator(norm_bound=1.0),
        torch.tensor([0.5, 1.0, 3.0])[:, None] * torch.eye(4)[:3],
    )
    torch.testing.assert_close(rule.clip(deltas).norm(dim=1).double(), rule.update_norms)
    assert rule.update_norms.tolist() == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", ["fedmerge", "fedavg"])
def test_a_bound_on_norms_bounds_what_one_client_moves(formulas, name):
    """‖ΔΘ_j‖ ≤ η q_ij · 2C between any two replies of client i; q_ij ≤ 1, and ρ_i for FedAvg."""
    case = formulas(5)
    rows = []
    for scale in (1.0, 1e6, -1e6):
        found = case.federation(f"strategy.name={name}", "robustness.norm_bound=0.5")
        update = found.strategy.update
        changes = {"0": scale}
        found.strategy.update = lambda replies, update=update, changes=changes: update(
            [
                dataclasses.replace(
                    reply, deltas=reply.deltas * changes.get(str(reply.client), 1.0)
                )
                for reply in replies
            ]
        )
        next(found.rounds())
        rows.append(found.strategy.soup.rows)
    assert max(float((row - rows[0]).norm(dim=1).max()) for row in rows) <= 2 * 0.5


def test_private_rows_are_not_clipped(formulas):
    case = formulas(3)
    free, bound = (
        case.federation("strategy.name=ditto"),
        case.federation("strategy.name=ditto", "robustness.norm_bound=1e-3"),
    )
    next(free.rounds())
    next(bound.rounds())
    assert torch.equal(free.strategy.soup.rows[1:], bound.strategy.soup.rows[1:])
    assert not torch.equal(free.strategy.soup.rows[0], bound.strategy.soup.rows[0])


# ---- influence of one client on another ----------------------------------------------------------


@pytest.mark.parametrize("rule", ["normalized", "adam", "gradient"])
@settings(max_examples=25, deadline=None)
@given(scale=st.floats(-1e20, 1e20), seed=st.integers(0, 100))
def test_no_reply_moves_anothers_logits(rule, scale, seed):
    logits = []
    for factor in (1.0, scale):
        strategy = make_strategy(
            FedMergeRecipe(name="fedmerge", adapters=3, start="independent", rule=rule), start()
        )
        deltas = random(4, 1, SIZE, seed=seed)
        deltas[0] *= factor
        strategy.update([Reply(client, deltas[client], 10, 1.0, 0.0) for client in range(4)])
        logits.append(strategy.merging.logits)
    assert torch.equal(logits[0][1:], logits[1][1:])


def test_with_the_papers_rule_one_reply_moves_all_logits():
    """Σ|G| runs over all clients, so the client with the longest update takes all of the step."""
    moved = []
    for factor in (1.0, 1e4):
        strategy = make_strategy(
            FedMergeRecipe(name="fedmerge", adapters=3, start="independent", rule="paper"), start()
        )
        first, *others = replies(range(4))
        strategy.update([dataclasses.replace(first, deltas=factor * first.deltas), *others])
        moved.append(strategy.merging.logits[1:].abs().max())
    assert moved[1] < moved[0] / 10


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "fedmerge",
        "fedavg",
        "ditto",
        "fedper",
        "fedrep",
        "feddpa",
        "ifca",
        "fesem",
        "flhc",
        "fedlease",
        "fedem",
        "femam",
        "ffa_lora",
        "rolora",
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_every_method_that_averages_accepts_every_rule(formulas, name, rule):
    found = formulas(6).federation(
        f"strategy.name={name}",
        f"robustness.aggregation={rule}",
        "robustness.norm_multiple=2",
        "rounds=3",
    )
    assert [record.update_norm >= 0 for record in found.rounds()] == [True] * 3
    assert found.strategy.soup.rows.isfinite().all()


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedex_lora", "fedalt", "fedpac"])
def test_a_method_without_a_mean_refuses_a_defence(formulas, name):
    with pytest.raises(RecipeError, match=rf"robustness: {name} does not compute its adapters as"):
        formulas(3).federation(f"strategy.name={name}", "robustness.aggregation=median")


def test_the_running_median_is_restored_after_an_interruption(
    smoke, smoke_engine, tmp_path, left_behind
):
    recipe = smoke(
        "rounds=4",
        "robustness.norm_multiple=0.8",
        "robustness.aggregation=trimmed_mean",
        "clients.fraction=0.5",
    )

    def interrupt(record):
        if record.round == 2:
            raise KeyboardInterrupt

    federate(recipe, tmp_path / "whole", engine=smoke_engine)
    with pytest.raises(KeyboardInterrupt):
        federate(
            recipe,
            tmp_path / "parts",
            engine=smoke_engine,
            callbacks=[Callback(on_round=interrupt)],
        )
    resume(tmp_path / "parts", engine=smoke_engine)
    assert left_behind(tmp_path / "parts") == left_behind(tmp_path / "whole")


def test_without_a_defence_fedavg_clips_nothing():
    strategy = make_strategy(FedAvgRecipe(name="fedavg"), start())
    assert not strategy.aggregator.recipe.defends
    strategy.update(replies(range(4)))
    assert strategy.aggregator.bound == math.inf

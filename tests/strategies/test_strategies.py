"""Strategies on rows of numbers, with no model."""

import pytest
import torch

from fedmerge_peft import AdapterLayout, RecipeError
from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.strategies import (
    FedAvgRecipe,
    FedMergeRecipe,
    LocalRecipe,
)
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.strategies.similarity import agreement, group_by_direction
from fedmerge_peft.training.plan import Train

SIZE = 12
LAYOUT = AdapterLayout.from_tensors(
    [("a.lora_A.weight", (2, 3), "lora"), ("head.weight", (2, 3), "head")]
)


def start(clients=4):
    return StrategyContext(
        clients,
        LAYOUT,
        lambda k: torch.randn(SIZE, generator=torch.Generator().manual_seed(k)),
        seed=1,
    )


def replies(clients, seed=0, sizes=None):
    generator = torch.Generator().manual_seed(seed)
    return [
        Reply(
            c, 0.1 * torch.randn(1, SIZE, generator=generator), (sizes or {}).get(c, 10), 1.0, 0.0
        )
        for c in clients
    ]


def test_every_client_is_served_its_weights_times_the_soup():
    for recipe in (
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent"),
        FedAvgRecipe(name="fedavg"),
        LocalRecipe(name="local"),
    ):
        strategy = make_strategy(recipe, start())
        strategy.update(replies(range(4)))
        torch.testing.assert_close(strategy.weights.sum(1), torch.ones(4))
        for client in range(4):
            torch.testing.assert_close(
                strategy.adapter(client), strategy.weights[client] @ strategy.soup.rows
            )


@pytest.mark.parametrize("name", ["fedavg", "fedmerge", "flhc", "ifca"])
def test_plans_and_updates_do_not_compute_the_weights_of_all_clients(formulas, name, monkeypatch):
    """With 100,000 clients, of which 100 reply, these weights take longer than all other steps."""
    case = formulas(6)
    strategy = case.strategy(name)
    for _ in range(5):  # past the grouping
        case.round(strategy)
    monkeypatch.setattr(type(strategy), "weights", property(lambda _: pytest.fail("all weights")))
    case.round(strategy, [1, 2])


@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
def test_a_single_plan_trains_the_served_adapter(formulas, name):
    """The round loop scores a plan's row instead of requesting the same numbers again."""
    case = formulas(4)
    strategy = case.strategy(name)
    for _ in range(2):
        for client in range(4):
            if isinstance(plan := strategy.plan(client), Train):
                assert (
                    torch.equal(plan.row, strategy.served(client))
                    or not strategy.trains_what_it_serves
                )
            assert strategy.trains_what_it_serves or name == "fedavg_ft"
        case.round(strategy)


def test_fedavg_is_the_mean_of_trained_adapters_weighted_by_examples():
    strategy = make_strategy(FedAvgRecipe(name="fedavg"), start())
    sent = strategy.adapter(0)
    answers = replies(range(4), sizes={0: 30})
    strategy.update(answers)
    trained = [sent - reply.delta for reply in answers]
    torch.testing.assert_close(
        strategy.adapter(2), (30 * trained[0] + 10 * (trained[1] + trained[2] + trained[3])) / 60
    )


def test_local_keeps_each_clients_own_adapter():
    strategy = make_strategy(LocalRecipe(name="local"), start())
    before = [strategy.adapter(client) for client in range(4)]
    answers = replies([1, 3])
    strategy.update(answers)
    assert torch.equal(strategy.adapter(0), before[0])
    torch.testing.assert_close(strategy.adapter(1), before[1] - answers[0].delta)
    torch.testing.assert_close(strategy.adapter(3), before[3] - answers[1].delta)
    assert strategy.traffic(0) == (0, 0)


def test_one_adapter_equals_fedavg():
    alone, fedavg = (
        make_strategy(FedMergeRecipe(name="fedmerge", adapters=1), start()),
        make_strategy(FedAvgRecipe(name="fedavg"), start()),
    )
    for turn in range(3):
        alone.update(replies(range(4), turn))
        fedavg.update(replies(range(4), turn))
    torch.testing.assert_close(alone.adapter(0), fedavg.adapter(0))


@pytest.mark.parametrize("rule", ["normalized", "paper"])
def test_identical_starts_equal_fedavg_in_every_round(rule):
    same = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="identical", rule=rule), start()
    )
    fedavg = make_strategy(FedAvgRecipe(name="fedavg"), start())
    for turn in range(4):
        same.update(replies(range(4), turn))
        fedavg.update(replies(range(4), turn))
    for client in range(4):
        torch.testing.assert_close(same.adapter(client), fedavg.adapter(client))


def test_independent_starts_differ():
    soup = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent"), start()
    ).soup.rows
    assert not torch.allclose(soup[0], soup[1])


def test_clients_that_did_not_reply_keep_their_weights():
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent"), start()
    )
    strategy.update(replies([0, 2]))
    moved = (strategy.weights - 1 / 3).abs().amax(1) > 1e-6
    assert moved.tolist() == [True, False, True, False]


def test_the_order_of_replies_does_not_matter():
    forwards, backwards = (
        make_strategy(FedMergeRecipe(name="fedmerge", adapters=3, start="independent"), start())
        for _ in range(2)
    )
    answers = replies(range(4))
    forwards.update(answers)
    backwards.update(reversed(answers))
    assert torch.equal(forwards.soup.rows, backwards.soup.rows)
    assert torch.equal(forwards.weights, backwards.weights)


def test_the_heads_columns_alone_may_decide_the_weights():
    whole = make_strategy(FedMergeRecipe(name="fedmerge", adapters=3, start="independent"), start())
    head = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent", weights_columns="head"),
        start(),
    )
    answers = replies(range(4))
    changed = [
        Reply(r.client, r.deltas * torch.tensor([5.0] * 6 + [1.0] * 6), r.size, 1.0, 0.0)
        for r in answers
    ]
    again = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent", weights_columns="head"),
        start(),
    )
    whole.update(answers)
    head.update(answers)
    again.update(changed)
    assert torch.equal(head.weights, again.weights)
    assert not torch.allclose(head.weights, whole.weights)


def test_the_paper_rule_uses_the_head_if_there_is_one():
    paper = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent", rule="paper"), start()
    )
    explicit = make_strategy(
        FedMergeRecipe(
            name="fedmerge", adapters=3, start="independent", rule="paper", weights_columns="head"
        ),
        start(),
    )
    everything = make_strategy(
        FedMergeRecipe(
            name="fedmerge", adapters=3, start="independent", rule="paper", weights_columns="all"
        ),
        start(),
    )
    for strategy in (paper, explicit, everything):
        strategy.update(replies(range(4)))
    assert torch.equal(paper.weights, explicit.weights)
    assert not torch.equal(paper.weights, everything.weights)


def test_the_heads_columns_need_a_head():
    headless = StrategyContext(
        4, AdapterLayout.from_tensors([("a", (SIZE,), "lora")]), lambda _: torch.zeros(SIZE)
    )
    with pytest.raises(RecipeError, match="no head"):
        make_strategy(FedMergeRecipe(name="fedmerge", weights_columns="head"), headless)


def opposed(clients, scale=1.0):
    """Updates in opposite directions for even and odd clients, plus a larger common part."""
    common = 3 * (torch.arange(SIZE) > 0)
    direction = torch.zeros(SIZE)
    direction[0] = scale
    return [
        Reply(c, (common + (direction if c % 2 else -direction))[None], 10, 1.0, 0.0)
        for c in clients
    ]


def test_a_warm_start_is_fedavg_until_the_grouping():
    warm = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=2, start="warm", warm_rounds=3), start()
    )
    fedavg = make_strategy(FedAvgRecipe(name="fedavg"), start())
    for turn in range(2):
        warm.update(replies(range(4), turn))
        fedavg.update(replies(range(4), turn))
    for client in range(4):
        torch.testing.assert_close(warm.adapter(client), fedavg.adapter(client))


def test_a_warm_start_gives_opposed_clients_adapters_of_their_own():
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=2, start="warm", warm_rounds=2), start()
    )
    before = strategy.adapter(0)
    for _ in range(2):
        strategy.update(opposed(range(4)))
    favorite = strategy.weights.argmax(1).tolist()
    assert favorite[0] == favorite[2] != favorite[1] == favorite[3]
    assert strategy.adapter(0)[0] > before[0] > strategy.adapter(1)[0]
    torch.testing.assert_close(strategy.adapter(0)[1:], strategy.adapter(1)[1:])


def test_a_warm_start_keeps_uniform_weights_for_clients_without_updates():
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=2, start="warm", warm_rounds=1), start()
    )
    strategy.update(opposed([0, 1, 2]))
    torch.testing.assert_close(strategy.weights[3], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(strategy.weights[:3].max(1).values, torch.full((3,), 0.8))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_own_groups_weight_is_warm_weight_at_any_temperature(temperature):
    recipe = FedMergeRecipe(
        name="fedmerge",
        adapters=6,
        start="warm",
        warm_rounds=1,
        groups=2,
        warm_weight=0.4,
        temperature=temperature,
    )
    strategy = make_strategy(recipe, start())
    strategy.update(opposed([0, 1, 2, 3]))
    torch.testing.assert_close(
        strategy.weights.sort(descending=True).values, torch.tensor([[0.4] + 5 * [0.12]] * 4)
    )
    assert len(set(strategy.weights.argmax(1).tolist())) == 2


def test_more_groups_than_adapters_are_refused():
    with pytest.raises(RecipeError, match="4 groups need 4 adapters"):
        FedMergeRecipe(name="fedmerge", adapters=3, groups=4)


def in_groups(truth, spread, seed=0):
    """Updates around one of three centers, of very different lengths, with a common part."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 50, generator=generator)
    lengths = torch.rand(len(truth), 1, generator=generator) * 8 + 2
    deltas = lengths * (
        centers[truth] - centers.mean(0) + spread * torch.randn(len(truth), 50, generator=generator)
    )
    return deltas - deltas.mean(0) + 5.0


@pytest.mark.parametrize("most", [3, 4, 8, 12, 20])
def test_grouping_uses_directions_and_determines_the_number_of_groups(most):
    truth = torch.arange(12) % 3
    groups = group_by_direction(in_groups(truth, 0.3), most, 0).groups
    assert all(
        (groups[i] == groups[k]) == (truth[i] == truth[k]) for i in range(12) for k in range(12)
    )


@pytest.mark.parametrize("clients", [4, 12, 25, 50])
@pytest.mark.parametrize("common", [0.3, 1.0, 5.0])
def test_clients_that_differ_only_by_noise_are_one_group(clients, common):
    noise = torch.randn(clients, 400, generator=torch.Generator().manual_seed(clients))
    found = group_by_direction(noise + common, clients, 0)
    assert found.groups.tolist() == [0] * clients
    assert "within groups is only" in found.reason


def test_clients_that_repeat_themselves_but_do_not_resemble_each_other_stay_alone():
    alone = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    found = group_by_direction(alone, 8, 0, repeatability=torch.full((5,), 0.6))
    assert found.groups.tolist() == [0, 1, 2, 3, 4]
    fewer = group_by_direction(alone, 4, 0, repeatability=torch.full((5,), 0.6))
    assert fewer.groups.tolist() == [0] * 5  # there are not as many adapters


def test_groups_that_larger_differences_hide_are_found_too():
    """Four groups of five: two pairs that differ much, and within each pair a small difference."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (
        torch.randn(2, 400, generator=generator),
        torch.randn(4, 400, generator=generator),
    )
    truth = torch.arange(20) % 4
    deltas = 4 * coarse[truth // 2] + fine[truth] + torch.randn(20, 400, generator=generator)
    groups = group_by_direction(deltas, 20, 0).groups
    assert all(
        (groups[i] == groups[k]) == (truth[i] == truth[k]) for i in range(20) for k in range(20)
    )
    assert int(group_by_direction(deltas, 3, 0).groups.max()) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_individual_differences_within_a_group_do_not_divide_it(seed):
    """Five groups of ten: k-means of so few clients finds similar differences by chance."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(50) % 5
    group, axes = (
        torch.randn(5, 400, generator=generator),
        torch.randn(60, 400, generator=generator),
    )
    own = torch.randn(50, 60, generator=generator) @ axes / 60**0.5
    noise = torch.randn(50, 400, generator=generator)
    groups = group_by_direction(1 + group[truth] + 0.8 * own + 0.3 * noise, 50, seed).groups
    assert all(
        (groups[i] == groups[k]) == (truth[i] == truth[k]) for i in range(50) for k in range(50)
    )


@pytest.mark.parametrize("copies", [6, 9])
def test_clients_with_identical_updates_are_one_group_and_others_keep_theirs(copies):
    """The remainders of identical updates, beyond their mean, are zero or rounding errors."""
    generator = torch.Generator().manual_seed(copies)
    truth, centers = torch.arange(12) % 2, torch.randn(3, 200, generator=generator)
    honest = centers[truth] + 0.5 * torch.randn(12, 200, generator=generator)
    deltas = torch.cat([honest, centers[2].expand(copies, 200)])
    groups = group_by_direction(deltas, len(deltas), 0).groups
    truth = torch.cat([truth, torch.full((copies,), 2)])
    same = truth[:, None] == truth
    assert torch.equal(groups[:, None] == groups, same)


def test_a_client_alone_is_one_group():
    assert group_by_direction(torch.ones(1, 5), 8, 0).groups.tolist() == [0]


def test_agreement_equals_a_slow_recomputation():
    directions = torch.nn.functional.normalize(
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), dim=1
    )
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    cosines = []
    for client in range(6):
        others = [k for k in range(6) if k != client and groups[k] == groups[client]]
        mean = directions[others].mean(0) if others else torch.zeros(4).double()
        cosines.append(float(directions[client] @ mean / mean.norm()) if others else 0.0)
    assert agreement(directions @ directions.T, groups) == pytest.approx(sum(cosines) / 6)

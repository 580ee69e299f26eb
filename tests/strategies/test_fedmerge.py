"""FedMerge's options, each on a case with a known answer."""

from dataclasses import replace

import pytest
import torch

from equality import assert_near
from fedmerge_peft import AdapterLayout
from fedmerge_peft.plugins import AGGREGATIONS
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.strategies import FedAvgRecipe, FedMergeRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.balancing import balancing_shifts

SIZE = 6
LAYOUT = AdapterLayout.from_tensors([("a.lora_A.weight", (2, 3), "lora")])


def start(clients=4):
    return StrategyContext(
        clients,
        LAYOUT,
        lambda k: torch.randn(SIZE, generator=torch.Generator().manual_seed(k)),
        seed=1,
    )


def fedmerge(clients=4, **fields):
    return make_strategy(
        FedMergeRecipe(name="fedmerge", **{"adapters": 3, "start": "independent", **fields}),
        start(clients),
    )


def replies(clients, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Reply(client, 0.1 * torch.randn(1, SIZE, generator=generator), 10, 1.0, 0.0)
        for client in clients
    ]


def towards(strategy, targets, rate=0.5):
    """Clients whose loss is ½‖θ − target‖², each after one gradient step of this rate."""
    return [
        Reply(c, rate * (strategy.adapter(c) - target)[None], 10, 1.0, 0.0)
        for c, target in enumerate(targets)
    ]


def test_temperature_sharpens_the_weights_and_nothing_else():
    plain, sharp = fedmerge(), fedmerge(temperature=0.5)
    for strategy in (plain, sharp):
        strategy.merging.logits = torch.tensor([[1.0, 0.0, -1.0]]).repeat(4, 1)
    torch.testing.assert_close(sharp.weights, torch.softmax(2 * plain.merging.logits, dim=1))


def test_memory_averages_the_weights_steps():
    gradients = [
        torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in range(3)
    ]
    strategy = fedmerge(2, rule="gradient", weights_memory=0.8, weights_lr=1.0)
    everyone, shares = torch.tensor([0, 1]), torch.tensor([0.5, 0.5], dtype=torch.float64)
    for gradient in gradients:
        move = strategy.steps.compute(everyone, gradient, shares)
    weights = torch.tensor([0.8**2, 0.8, 1.0], dtype=torch.float64)
    mean = (
        sum(weight * gradient for weight, gradient in zip(weights, gradients, strict=True))
        / weights.sum()
    )
    torch.testing.assert_close(move, 0.5 * mean)


def test_memory_counts_only_the_rounds_a_client_replied_in():
    strategy = fedmerge(2, rule="gradient", weights_memory=0.9, weights_lr=1.0)
    shares, gradient = (
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64),
    )
    strategy.steps.compute(torch.tensor([0]), 5 * gradient, shares)
    torch.testing.assert_close(
        strategy.steps.compute(torch.tensor([1]), gradient, shares), gradient
    )


def test_adam_steps_each_logit_by_its_own_scale():
    strategy = fedmerge(1, rule="adam", weights_lr=0.3)
    gradient = torch.tensor([[100.0, -0.001, 0.0]], dtype=torch.float64)
    move = strategy.steps.compute(
        torch.tensor([0]), gradient, torch.tensor([1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(move, torch.tensor([[0.3, -0.3, 0.0]], dtype=torch.float64))


def test_balance_gives_all_adapters_the_same_mass():
    logits = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.softmax(logits + balancing_shifts(logits), dim=1)
    torch.testing.assert_close(
        weights.mean(0), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_balance_is_finite_with_unused_adapters():
    assert balancing_shifts(torch.tensor([[200.0, 0.0], [200.0, 0.0]])).isfinite().all()


def test_balance_decays_over_its_rounds():
    strategy, free = fedmerge(balance_rounds=3, weights_lr=0.0), fedmerge(weights_lr=0.0)
    away = []
    for each in (strategy, free):
        each.merging.logits = torch.tensor(
            [[3.0, 0.0, 0.0], [2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [3.0, 1.0, 1.0]]
        )
    for _ in range(3):
        strategy.update(replies(range(4)))
        away.append(float((strategy.weights.mean(0) - 1 / 3).abs().max()))
    assert 0.01 < away[0] < away[1] < away[2]
    assert torch.equal(strategy.weights, free.weights)


def test_noise_spreads_the_adapters_around_one_start():
    rows = fedmerge(start="noise", start_noise=0.01).soup.rows
    away = rows - start().fresh_row(0)
    assert 0.003 < float(away.std()) < 0.03
    assert torch.linalg.matrix_rank(away) == 3


def test_an_unused_adapter_is_reset_for_half_of_the_busiest_ones_clients():
    strategy = fedmerge(4, adapters=2, reseed_after=2, weights_lr=0.0, start="identical")
    strategy.merging.logits = torch.tensor([[4.0, -4.0]]).repeat(4, 1)
    direction = torch.zeros(SIZE)
    direction[0] = 1.0
    opposed = [
        Reply(c, (torch.ones(SIZE) + (direction if c % 2 else -direction))[None], 10, 1.0, 0.0)
        for c in range(4)
    ]
    strategy.update(opposed)
    assert strategy.weights.argmax(1).tolist() == [0, 0, 0, 0]
    strategy.update(opposed)
    favorite = strategy.weights.argmax(1).tolist()
    assert favorite[0] == favorite[2] != favorite[1] == favorite[3]
    assert float(strategy.adapter(0)[0]) > float(strategy.adapter(1)[0])


@pytest.mark.parametrize("fields", [{"server_momentum": 0.5}, {"server_optimizer": "adam"}])
def test_one_adapter_with_a_server_optimizer_is_fedavg_with_it(fields):
    alone = fedmerge(adapters=1, **fields)
    fedavg = make_strategy(FedAvgRecipe(name="fedavg", **fields), start())
    for turn in range(3):
        alone.update(replies(range(4), turn))
        fedavg.update(replies(range(4), turn))
    torch.testing.assert_close(alone.adapter(0), fedavg.adapter(0))


def test_momentum_is_the_running_sum_of_the_mean_updates():
    strategy = make_strategy(
        FedAvgRecipe(name="fedavg", server_momentum=0.5, server_lr=0.1), start(1)
    )
    before = strategy.adapter(0)
    first, second = replies([0], 1), replies([0], 2)
    strategy.update(first)
    strategy.update(second)
    torch.testing.assert_close(
        strategy.adapter(0), before - 0.1 * (1.5 * first[0].delta + second[0].delta)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rule": "adam"},
        {"weights_memory": 0.8},
        {"balance_rounds": 5},
        {"start": "noise", "start_noise": 0.3},
        {"start": "warm"},
        {"reseed_after": 2},
    ],
    ids=str,
)
def test_two_groups_with_opposed_updates_get_adapters_of_their_own(fields):
    targets = [
        torch.tensor([3.0, 0, 0, 0, 0, 0]) * (1 if client % 2 else -1) for client in range(6)
    ]
    strategy = fedmerge(6, **fields)
    for _ in range(40):
        strategy.update(towards(strategy, targets))
    for client, target in enumerate(targets):
        assert float((strategy.adapter(client) - target).norm()) < 1.0  # the two wishes are 6 apart
        assert (
            strategy.weights[client] @ strategy.weights[(client + 2) % 6]
            > strategy.weights[client] @ strategy.weights[(client + 1) % 6]
        )


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_first_step_of_the_weights_is_the_gradient_of_the_objective(temperature):
    strategy = fedmerge(rule="gradient", weights_lr=1.0, temperature=temperature)
    answers = replies(range(4))
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    merged = torch.softmax(logits / temperature, dim=1) @ strategy.soup.rows.double()
    (0.25 * (merged * torch.cat([reply.deltas for reply in answers]).double()).sum()).backward()
    strategy.update(answers)
    assert_near(strategy.merging.logits, -logits.grad)


WIDE = AdapterLayout.from_tensors([("a.lora_A.weight", (7, 149), "lora")])


def sent_by(recipe, rounds, cohorts, robustness):
    """The adapters that a strategy sends in each round, to clients that pull it to their own."""
    context = replace(
        start(6),
        layout=WIDE,
        fresh_row=lambda k: torch.randn(WIDE.size, generator=torch.Generator().manual_seed(k)),
        aggregator=Aggregator(RobustnessRecipe(**robustness)),
    )
    strategy, targets = make_strategy(recipe, context), context.fresh_row
    for number in range(rounds):
        sent = {client: strategy.plan(client).row for client in cohorts[number]}
        yield sent
        strategy.update(
            Reply(client, 0.3 * (row - targets(client % 3 + 1))[None], 10 + client, 1.0, 0.0)
            for client, row in sent.items()
        )


@pytest.mark.parametrize("cohorts", [[range(6)] * 4, [[0, 1, 4], [2, 3, 5], [1, 2, 3], [0, 4, 5]]])
@pytest.mark.parametrize(
    "robustness",
    [
        {},
        {"norm_multiple": 0.7},
        *({"aggregation": entry.name} for entry in AGGREGATIONS if entry.name != "mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "server",
    [{}, {"server_lr": 0.3, "server_momentum": 0.9}, {"server_optimizer": "adam"}],
    ids=str,
)
def test_in_warm_rounds_clients_are_sent_fedavgs_adapter_bit_for_bit(server, robustness, cohorts):
    fedmerge = FedMergeRecipe(name="fedmerge", adapters=3, start="warm", warm_rounds=3, **server)
    fedavg = FedAvgRecipe(name="fedavg", **server)
    sent, expected = (
        list(sent_by(recipe, 4, cohorts, robustness)) for recipe in (fedmerge, fedavg)
    )
    for ours, theirs in zip(sent[:3], expected[:3], strict=True):
        assert all(torch.equal(ours[client], row) for client, row in theirs.items())
    assert not all(torch.equal(sent[3][client], row) for client, row in expected[3].items())


def test_a_warm_round_moves_all_adapters_and_the_servers_moments_alike():
    strategy = fedmerge(start="warm", warm_rounds=3, server_momentum=0.5)
    strategy.update(replies(range(4)))
    state = strategy.state_dict()
    for tensor in (strategy.soup.rows, state["server.momentum_buffer"]):
        assert tensor.shape == (3, SIZE)
        assert torch.equal(tensor, tensor[:1].repeat(3, 1))


def test_a_warm_round_of_the_chain_rule_has_a_step_of_one_dth():
    plain, chain = (
        fedmerge(start="warm", warm_rounds=3, rule=rule) for rule in ("normalized", "gradient")
    )
    before = plain.adapter(0)
    for strategy in (plain, chain):
        strategy.update(replies(range(4)))
    assert_near(before - chain.adapter(0), (before - plain.adapter(0)) / 3)

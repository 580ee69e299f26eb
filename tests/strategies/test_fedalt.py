"""FedALT: own halves of the ranks, and the mean of the others', on formula clients."""

import pytest
import torch

from strategies.factor_pairs import columns, halves


def test_fedalts_rest_of_the_world_is_the_mean_of_the_other_clients_own_halves(formulas):
    """All others have the same weight. The own half and the head stay as they were trained."""
    case = formulas(3, sizes=[10, 20, 30])
    strategy = case.strategy("fedalt")
    rest, own = halves(case.layout)
    head = columns(case.layout, "head")
    for _ in range(2):
        case.round(strategy)
        for client in range(3):
            served = strategy.served(client)
            others = [case.centers[other][own] for other in range(3) if other != client]
            torch.testing.assert_close(served[rest], (others[0] + others[1]) / 2)
            torch.testing.assert_close(served[own], case.centers[client][own])
            torch.testing.assert_close(served[head], case.centers[client][head])
    assert strategy.traffic(0) == (48, 48)


def test_fedalt_trains_the_own_half_with_the_rest_frozen(formulas):
    case = formulas(2)
    strategy = case.strategy("fedalt")
    rest, _ = halves(case.layout)
    for _ in range(2):
        plan = strategy.plan(0)
        assert torch.equal(plan.phases[0], ~rest)
        assert torch.equal(plan.row, strategy.served(0))
        case.round(strategy)
    state = case.layout.state_dict(strategy.served(0))
    a, b = state["one.lora_A.weight"], state["one.lora_B.weight"]
    torch.testing.assert_close(b @ a, b[:, :2] @ a[:2] + b[:, 2:] @ a[2:])


def test_fedalt_counts_pausing_clients_with_their_last_adapter_and_newcomers_not(formulas):
    case = formulas(4)
    strategy = case.strategy("fedalt")
    rest, own = halves(case.layout)
    start = case.fresh_row(0)
    case.round(strategy, [0])
    torch.testing.assert_close(strategy.served(0)[rest], start[rest])  # no others yet
    for client in (1, 2, 3):
        torch.testing.assert_close(strategy.served(client)[rest], case.centers[0][own])
        assert torch.equal(strategy.served(client)[own], start[own])
    case.round(strategy, [1])
    torch.testing.assert_close(strategy.served(0)[rest], case.centers[1][own])
    torch.testing.assert_close(strategy.served(1)[rest], case.centers[0][own])
    torch.testing.assert_close(strategy.served(2)[rest], case.centers[:2].mean(0)[own])


def test_fedalts_gap_is_the_change_of_the_rest_of_the_world(formulas):
    """The own halves do not change between two rounds, so from the second on there is no gap."""
    case = formulas(3)
    rest, own = halves(case.layout)
    start, total = case.fresh_row(0), case.centers.sum(0)
    first, second = case.federation("strategy=fedalt", "rounds=2").rounds()
    moved = [float(((total - c)[own] / 2 - start[rest]).norm()) for c in case.centers]
    assert first.gap == pytest.approx(sum(moved) / 3, rel=1e-4)
    assert second.gap == pytest.approx(0, abs=1e-5)


def test_the_server_optimizer_steps_from_the_last_rest_of_the_world_to_the_mean(formulas):
    """R_1 = R_0 + η (mean − R_0), then momentum adds half of that step once more."""
    case = formulas(3)
    strategy = case.strategy("fedalt", server_lr=0.5, server_momentum=0.5)
    rest, own = halves(case.layout)
    start, mean = case.fresh_row(0)[rest], case.centers[1:].mean(0)[own]
    case.round(strategy)
    first = start + 0.5 * (mean - start)
    torch.testing.assert_close(strategy.served(0)[rest], first)
    case.round(strategy)
    second = first + 0.5 * ((mean - first) + 0.5 * (mean - start))
    torch.testing.assert_close(strategy.served(0)[rest], second)
    torch.testing.assert_close(strategy.served(0)[own], case.centers[0][own])


def test_a_rest_without_others_does_not_move(formulas):
    case = formulas(2)
    strategy = case.strategy("fedalt", server_optimizer="adam")
    rest, _ = halves(case.layout)
    case.round(strategy, [0])
    assert torch.equal(strategy.served(0)[rest], case.fresh_row(0)[rest])

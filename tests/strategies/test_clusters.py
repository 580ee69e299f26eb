"""Clustered methods and FedEM on clients with known clusters, and on a tiny model."""

import pytest
import torch

from fedmerge_peft import federate, load_run
from fedmerge_peft.strategies import Reply
from strategies.quadratic_clients import (
    QUADRATICS,
    RECIPES,
    SIZE,
    SIZES,
    TARGETS,
    TRUTH,
    assert_truth,
    federated,
    make,
    mean_of_targets,
    replies,
)

BY_SIZE = [("ifca", True), ("fesem", False), ("flhc", True)]


@pytest.mark.parametrize(("name", "by_size"), BY_SIZE)
def test_clusters_and_centers_are_recovered(name, by_size):
    strategy = federated(make(name), QUADRATICS, 30)
    assert_truth(strategy)
    for client in range(9):
        torch.testing.assert_close(
            strategy.served(client), mean_of_targets(TRUTH[client], by_size), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(("name", "by_size"), BY_SIZE)
@pytest.mark.parametrize("cohort", [2, 6])
def test_with_partial_participation_a_center_moves_with_its_own_clients_alone(
    name, by_size, cohort
):
    strategy = federated(make(name), QUADRATICS, 40, cohort)
    assert_truth(strategy)
    before, cluster = strategy.soup.rows, strategy.weights.argmax(1)
    strategy.update(replies(strategy, QUADRATICS, [0, 3, 1]))
    sizes = SIZES.float() if by_size else torch.ones(9)
    shares = sizes[[0, 3]] / sizes[[0, 3]].sum()
    torch.testing.assert_close(
        strategy.soup.rows[cluster[0]], 0.5 * before[cluster[0]] + 0.5 * shares @ TARGETS[[0, 3]]
    )
    torch.testing.assert_close(
        strategy.soup.rows[cluster[1]], 0.5 * before[cluster[1]] + 0.5 * TARGETS[1]
    )
    assert torch.equal(strategy.soup.rows[cluster[2]], before[cluster[2]])


@pytest.mark.parametrize(("name", "by_size"), BY_SIZE[1:])
def test_a_newcomers_first_reply_assigns_it_to_a_cluster_and_moves_no_adapter(name, by_size):
    strategy, without = make(name), make(name)
    for each in (strategy, without):
        for _ in range(3):
            each.update(replies(each, QUADRATICS, range(7)))
    mean = strategy.soup.rows.mean(0)
    torch.testing.assert_close(strategy.plan(7).row, mean)
    # with a step so small, the adapter nearest to what they trained is the same for both
    little = [
        Reply(client, 1e-4 * (mean - TARGETS[client])[None], 10, 0.0, 0.0) for client in (7, 8)
    ]
    old = list(replies(strategy, QUADRATICS, [0]))
    strategy.update(old + little)
    without.update(old)
    assert torch.equal(strategy.soup.rows, without.soup.rows)
    assert_truth(strategy)
    before = strategy.served(7)
    strategy.update(replies(strategy, QUADRATICS, [7]))
    # from its second reply on, the client moves its center
    torch.testing.assert_close(strategy.served(7), 0.5 * before + 0.5 * TARGETS[7])


@pytest.mark.parametrize("name", RECIPES)
def test_the_order_of_replies_does_not_matter(name):
    forwards, backwards = make(name), make(name)
    for _ in range(3):
        answers = list(replies(forwards, QUADRATICS, range(9)))
        forwards.update(answers)
        backwards.update(reversed(answers))
        assert torch.equal(forwards.soup.rows, backwards.soup.rows)
        assert torch.equal(forwards.weights, backwards.weights)


@pytest.mark.parametrize("name", RECIPES)
def test_one_adapter_is_fedavg_or_its_plain_mean(name):
    strategy = federated(make(RECIPES[name].model_copy(update={"adapters": 1})), QUADRATICS, 20)
    weights = (torch.ones(9) if name == "fesem" else SIZES).float()
    torch.testing.assert_close(
        strategy.soup.rows[0], weights @ TARGETS / weights.sum(), rtol=1e-4, atol=1e-3
    )
    assert torch.equal(strategy.weights, torch.ones(9, 1))
    assert strategy.warnings() == []


@pytest.mark.parametrize("name", RECIPES)
def test_fewer_clients_than_adapters(name):
    strategy = federated(
        make(RECIPES[name].model_copy(update={"adapters": 5}), clients=2), QUADRATICS[:2], 10
    )
    assert strategy.soup.rows.isfinite().all()
    torch.testing.assert_close(strategy.weights.sum(1), torch.ones(2))


def test_traffic():
    expected = {
        "ifca": (3 * SIZE, SIZE),
        "fesem": (SIZE, SIZE),
        "flhc": (SIZE, SIZE),
        "fedem": (3 * SIZE, 3 * SIZE),
    }
    assert {name: make(name).traffic(0) for name in RECIPES} == expected


# ---- the local-global gap ------------------------------------------------------------------------


def test_ifcas_gap_is_of_the_adapter_that_was_chosen(formulas):
    """Two clients with minima θ_0 ± a choose the first adapter: a gap of ‖a‖ each.

    Their mean leaves it at θ_0. The third client alone has the second adapter: a gap of 0.
    """
    case = formulas(3)
    a = 0.1 * torch.ones(case.layout.size)
    case.centers = torch.stack(
        [case.fresh_row(0) + a, case.fresh_row(0) - a, case.fresh_row(1) + a]
    )
    record = next(case.federation("strategy={name: ifca, adapters: 2}").rounds())
    assert record.gap == pytest.approx(2 / 3 * float(a.norm()), rel=1e-4)


# ---- on a tiny model -----------------------------------------------------------------------------

BYTES = {"ifca": (3, 1), "fesem": (1, 1), "flhc": (1, 1), "fedem": (3, 3)}


@pytest.mark.parametrize("name", RECIPES)
def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path, name):
    warm = ["strategy.warm_rounds=1"] if name == "flhc" else []
    run = federate(
        smoke(f"strategy={name}", "strategy.adapters=3", *warm),
        tmp_path / name,
        engine=smoke_engine,
    )
    one = 6 * 4 * smoke_engine.backbone.layout.size
    for record in run.records:
        assert (record["bytes_down"], record["bytes_up"]) == (
            BYTES[name][0] * one,
            BYTES[name][1] * one,
        )
        assert 0 <= record["served"]["mean"] <= 1
    soup, weights = load_run(run.path).soup, load_run(run.path).weights
    assert soup.rows.isfinite().all()
    assert weights.shape == (6, 3)
    assert weights.sum(axis=1).to_list() == pytest.approx([1.0] * 6)
    assert run.summary["final"]["served"]["validation_loss"] > 0
    if name != "fedem":
        row = soup.merge(torch.tensor(weights.loc["Harbour Clinic"].to_numpy()))
        saved = run.adapter("Harbour Clinic")
        assert all(torch.equal(saved[key], value) for key, value in soup.state_dict(row).items())

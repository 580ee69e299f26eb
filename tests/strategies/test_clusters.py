"""Clusterings, and the mixture as one: on clients whose clusters are known, and on a tiny model."""

import random
from dataclasses import dataclass

import pytest
import torch

from fedmerge_peft import AdapterLayout, federate, load_run
from fedmerge_peft.recipe.strategies import FedEMRecipe, FeSEMRecipe, FLHCRecipe, IFCARecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
from fedmerge_peft.strategies.flhc import hierarchical_clusters
from fedmerge_peft.testing import reply_to
from fedmerge_peft.training.plan import Choose, Trained
from fedmerge_peft.util.seeds import derive

SIZE = 20
LAYOUT = AdapterLayout.from_tensors([("a.lora_A.weight", (4, 5), "lora")])
CENTRES = 10 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(42))
TRUTH = torch.arange(9) % 3
SIZES = torch.tensor([10, 40, 20, 30, 10, 20, 50, 30, 10])
TARGETS = CENTRES[TRUTH] + 0.5 * torch.randn(9, SIZE, generator=torch.Generator().manual_seed(43))
RECIPES = {
    "ifca": IFCARecipe(name="ifca", adapters=3),
    "fesem": FeSEMRecipe(name="fesem", adapters=3),
    "flhc": FLHCRecipe(name="flhc", adapters=3, warm_rounds=2),
    "fedem": FedEMRecipe(name="fedem", adapters=3),
}


def noise(number):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number))


def near(number):
    """Starts that lean a little towards the centres: what IFCA's guarantee asks for."""
    return 0.2 * CENTRES[number % 3] + 0.1 * noise(number)


def make(recipe, fresh_row=near, clients=9):
    return make_strategy(
        recipe if not isinstance(recipe, str) else RECIPES[recipe],
        StrategyContext(clients, LAYOUT, fresh_row, seed=1),
    )


@dataclass(frozen=True)
class Quadratic:
    """ℓ(θ) = ½‖θ − target‖²; a round of training goes half of the way."""

    target: torch.Tensor
    size: int = 10

    def hands(self):
        def losses(row):
            return (0.5 * (row - self.target).square().sum() / self.size).repeat(self.size)

        def train(job, seed):
            weight = 1.0 if job.example_weights is None else float(job.example_weights.mean())
            return Trained(
                job.row - 0.5 * weight * (job.row - self.target), float(losses(job.row).mean()), 1
            )

        return train, losses


QUADRATICS = [Quadratic(target, int(size)) for target, size in zip(TARGETS, SIZES, strict=True)]


def replies(strategy, clients, who):
    for index in who:
        client, seed = clients[index], derive(0, index)
        yield reply_to(strategy.plan(index), index, client.size, *client.hands(), seed)


def federated(strategy, clients, rounds, cohort=None, seed=0):
    """Rounds with replies in any order; what was sent must outlive the update."""
    order = random.Random(seed)
    for _ in range(rounds):
        who = order.sample(range(len(clients)), cohort or len(clients))
        plans = [strategy.plan(index) for index in who]
        before = [plan.sent.clone() for plan in plans]
        strategy.update(replies(strategy, clients, who))
        assert all(torch.equal(plan.sent, sent) for plan, sent in zip(plans, before, strict=True))
    return strategy


def mean_of_targets(group, by_size):
    weights = (group == TRUTH) * (SIZES if by_size else torch.ones(9))
    return weights.float() @ TARGETS / weights.sum()


# ---- clusters that are known ---------------------------------------------------------------------


def assert_truth(strategy):
    """Each client is served with one adapter alone, and shares it with its own kind."""
    assert strategy.weights.max(1).values.tolist() == [1] * 9
    groups = strategy.weights.argmax(1)
    assert all(
        (groups[i] == groups[k]) == (TRUTH[i] == TRUTH[k]) for i in range(9) for k in range(9)
    )


BY_SIZE = [("ifca", True), ("fesem", False), ("flhc", True)]


@pytest.mark.parametrize(("name", "by_size"), BY_SIZE)
def test_clusters_and_centres_are_found(name, by_size):
    strategy = federated(make(name), QUADRATICS, 30)
    assert_truth(strategy)
    for client in range(9):
        torch.testing.assert_close(
            strategy.served(client), mean_of_targets(TRUTH[client], by_size), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(("name", "by_size"), BY_SIZE)
@pytest.mark.parametrize("cohort", [2, 6])
def test_clusters_are_found_with_some_clients_a_round_and_a_centre_moves_with_its_own_alone(
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
def test_a_newcomers_first_reply_places_it_where_its_training_leads_and_moves_no_adapter(
    name, by_size
):
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
    torch.testing.assert_close(
        strategy.served(7), 0.5 * before + 0.5 * TARGETS[7]
    )  # from now on it counts


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


# ---- IFCA ----------------------------------------------------------------------------------------


def test_ifca_offers_all_adapters_and_leaves_a_cluster_that_nobody_chose():
    strategy = make("ifca")
    before = strategy.soup.rows
    assert isinstance(strategy.plan(0), Choose)
    torch.testing.assert_close(strategy.served(0), before.mean(0))  # it has not chosen yet
    strategy.update(replies(strategy, QUADRATICS, [0, 3, 1]))
    assert torch.equal(strategy.soup.rows[2], before[2])
    trained = [before[0] - 0.5 * (before[0] - TARGETS[client]) for client in (0, 3)]
    torch.testing.assert_close(strategy.soup.rows[0], 0.25 * trained[0] + 0.75 * trained[1])
    assert strategy.weights.argmax(1)[[0, 3, 1]].tolist() == [0, 0, 1]
    torch.testing.assert_close(strategy.weights[2], torch.full((3,), 1 / 3))


def test_ifca_may_leave_adapters_over_and_says_so():
    """An adapter that starts ahead for all clients keeps them: the known weakness."""
    strategy = federated(
        make("ifca", lambda number: CENTRES.mean(0) if number == 0 else 100 + noise(number)),
        QUADRATICS,
        5,
    )
    assert strategy.weights.argmax(1).tolist() == [0] * 9
    assert strategy.warnings() == [
        "adapters 1, 2 of 3 are unused (less than a quarter of the uniform share of the clients' weight)"
    ]


# ---- FeSEM ---------------------------------------------------------------------------------------


def test_fesem_moves_a_client_to_the_centre_that_its_adapter_comes_nearest_to():
    strategy = federated(make("fesem"), QUADRATICS, 10)
    start, target = strategy.weights[0].argmax(), strategy.weights[1].argmax()
    centre = strategy.soup.rows[target].clone()
    trained = centre + 0.1
    strategy.update([Reply(0, (strategy.served(0) - trained)[None], 10, 0.0, 0.0)])
    assert strategy.weights[0].argmax() == target != start
    torch.testing.assert_close(
        strategy.soup.rows[target], trained
    )  # the mean of this round's replies


def test_fesem_keeps_a_centre_that_no_reply_is_nearest_to():
    strategy = federated(make("fesem"), QUADRATICS, 3)
    before = strategy.soup.rows
    strategy.update(replies(strategy, QUADRATICS, [0, 3]))
    changed = (strategy.soup.rows != before).any(1)
    assert changed.sum() == 1
    assert changed[strategy.weights[0].argmax()]


def test_fesem_waits_for_as_many_clients_as_clusters_and_clusters_all_that_it_has_seen():
    strategy = make("fesem", noise)
    start = strategy.soup.rows
    strategy.update(replies(strategy, QUADRATICS, [0, 1]))
    assert strategy.warnings() == [
        "until clients are clustered, all train the same adapter; clients still needed: 1"
    ]
    assert torch.equal(strategy.soup.rows, start)
    torch.testing.assert_close(strategy.weights, torch.full((9, 3), 1 / 3))
    first = 0.5 * (noise(0) + TARGETS)
    moved = first[0] + 0.2
    answers = list(replies(strategy, QUADRATICS, [2, 3]))
    strategy.update([*answers, Reply(0, (noise(0) - moved)[None], 10, 0.0, 0.0)])
    assert strategy.weights[:4].argmax(1).unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(
        strategy.served(0), 0.5 * (0.5 * (first[0] + moved) + first[3])
    )  # client 0 counts with its mean
    torch.testing.assert_close(strategy.served(1), first[1])
    torch.testing.assert_close(strategy.served(2), first[2])
    assert strategy.warnings() == []


def test_fesem_tells_rows_apart_that_are_long_and_close():
    """Squared, these rows are 1e8 times what tells them apart: in single precision, inner products would see nothing."""
    far = 1e4 * torch.ones(SIZE)
    strategy = make(FeSEMRecipe(name="fesem", adapters=2), lambda _: far, clients=30)
    close = [Quadratic(far + (1.0 if client % 2 else -1.0)) for client in range(30)]
    for _ in range(3):
        strategy.update(replies(strategy, close, range(30)))
    groups = strategy.weights.argmax(1)
    assert groups[0] != groups[1]
    assert torch.equal(groups, groups[:2].repeat(15))


# ---- FL+HC ---------------------------------------------------------------------------------------


def test_flhc_is_fedavg_before_the_clustering_and_each_clusters_own_from_that_round_on():
    strategy = make("flhc", noise)
    assert strategy.warnings() == [
        "until clients are clustered after round 2, flhc equals FedAvg; completed rounds: 0"
    ]
    federated(strategy, QUADRATICS, 1)
    shares = SIZES / SIZES.sum()
    fedavg = 0.5 * noise(0) + 0.5 * shares @ TARGETS
    torch.testing.assert_close(strategy.soup.rows, fedavg.expand(3, -1))
    torch.testing.assert_close(strategy.weights, torch.full((9, 3), 1 / 3))
    federated(strategy, QUADRATICS, 1)
    for client in range(9):
        torch.testing.assert_close(
            strategy.served(client), 0.5 * fedavg + 0.5 * mean_of_targets(TRUTH[client], True)
        )
    assert strategy.warnings() == []


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_flhc_clusters_by_any_metric_and_linkage(metric, linkage):
    strategy = federated(
        make(FLHCRecipe(name="flhc", adapters=3, metric=metric, linkage=linkage)), QUADRATICS, 2
    )
    groups = strategy.weights.argmax(1)
    assert all(
        (groups[i] == groups[k]) == (TRUTH[i] == TRUTH[k]) for i in range(9) for k in range(9)
    )


def test_flhc_clusters_by_the_last_update_of_everyone_seen_in_a_warm_round():
    strategy = make(FLHCRecipe(name="flhc", adapters=2, warm_rounds=2), noise)
    one, other = torch.eye(SIZE)[0], torch.eye(SIZE)[1]

    def answer(*deltas):
        strategy.update([Reply(client, delta[None], 10, 0.0, 0.0) for client, delta in deltas])

    answer((0, one), (2, 10 * one))
    fedavg = strategy.served(5)
    torch.testing.assert_close(fedavg, noise(0) - 5.5 * one)
    answer((1, other), (2, 3 * other))  # client 2 went with client 0 before
    assert strategy.clusters.tolist() == [
        strategy.clusters[0],
        *2 * [1 - strategy.clusters[0]],
    ] + 6 * [-1]
    torch.testing.assert_close(strategy.served(0), fedavg)
    torch.testing.assert_close(strategy.served(1), fedavg - 2 * other)


def test_flhc_waits_for_as_many_clients_as_clusters():
    strategy = make(FLHCRecipe(name="flhc", adapters=3, warm_rounds=1), noise)
    strategy.update(replies(strategy, QUADRATICS, [0, 1]))
    assert strategy.warnings() == [
        "until clients are clustered, flhc equals FedAvg; clients still needed: 1"
    ]
    shares = SIZES[:2] / SIZES[:2].sum()
    fedavg = 0.5 * noise(0) + 0.5 * shares @ TARGETS[:2]
    torch.testing.assert_close(strategy.soup.rows, fedavg.expand(3, -1))
    strategy.update(replies(strategy, QUADRATICS, [2]))
    assert sorted(strategy.clusters[:3].tolist()) == [0, 1, 2]
    torch.testing.assert_close(strategy.served(2), 0.5 * fedavg + 0.5 * TARGETS[2])
    torch.testing.assert_close(strategy.served(0), fedavg)  # nobody of its cluster replied
    assert strategy.warnings() == []


def test_flhc_with_one_cluster_is_fedavg_for_newcomers_too():
    strategy = make(FLHCRecipe(name="flhc", adapters=1, warm_rounds=1), noise)
    expected = noise(0)
    for who in ([0, 1], [2, 3], [8]):
        strategy.update(replies(strategy, QUADRATICS, who))
        expected = 0.5 * expected + 0.5 * (SIZES[who] / SIZES[who].sum()) @ TARGETS[who]
        torch.testing.assert_close(strategy.served(5), expected)


def test_an_update_of_zero_is_far_from_all_by_cosine():
    deltas = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    assert len({*hierarchical_clusters(deltas, 3, "cosine", "average").tolist()}) == 3
    assert (
        hierarchical_clusters(deltas, 3, "cosine", "average")[0]
        == hierarchical_clusters(deltas, 3, "cosine", "average")[1]
    )


# ---- the local-global gap ------------------------------------------------------------------------


def test_ifcas_gap_is_of_the_adapter_that_was_chosen(formulas):
    """c_0, c_1 = θ_0 ± a choose the first adapter, which their mean leaves at θ_0: ‖a‖ each. c_2 has the second alone: 0."""
    case = formulas(3)
    a = 0.1 * torch.ones(case.layout.size)
    case.centres = torch.stack(
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

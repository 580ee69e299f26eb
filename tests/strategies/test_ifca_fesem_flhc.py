"""IFCA, FeSEM and FL+HC on clients with known clusters."""

import pytest
import torch

from fedmerge_peft.recipe.strategies import FeSEMRecipe, FLHCRecipe
from fedmerge_peft.strategies import Reply
from fedmerge_peft.strategies.flhc import hierarchical_clusters
from fedmerge_peft.training.plan import Choose
from strategies.quadratic_clients import (
    CENTERS,
    QUADRATICS,
    SIZE,
    SIZES,
    TARGETS,
    TRUTH,
    Quadratic,
    federated,
    make,
    mean_of_targets,
    noise,
    replies,
)

# ---- IFCA ----------------------------------------------------------------------------------------


def test_ifca_sends_all_adapters_and_keeps_those_that_no_client_chose():
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


def test_ifca_may_leave_adapters_unused_with_a_warning():
    """An adapter that starts nearest to all clients keeps them: IFCA's known weakness."""
    strategy = federated(
        make("ifca", lambda number: CENTERS.mean(0) if number == 0 else 100 + noise(number)),
        QUADRATICS,
        5,
    )
    assert strategy.weights.argmax(1).tolist() == [0] * 9
    assert strategy.warnings() == [
        "adapters 1, 2 (numbered from 0) are unused: their mean merging weight over the clients "
        "is below a quarter of 1/3"
    ]


# ---- FeSEM ---------------------------------------------------------------------------------------


def test_fesem_moves_a_client_to_the_center_that_its_adapter_comes_nearest_to():
    strategy = federated(make("fesem"), QUADRATICS, 10)
    start, target = strategy.weights[0].argmax(), strategy.weights[1].argmax()
    center = strategy.soup.rows[target].clone()
    trained = center + 0.1
    strategy.update([Reply(0, (strategy.served(0) - trained)[None], 10, 0.0, 0.0)])
    assert strategy.weights[0].argmax() == target != start
    # the mean of this round's replies
    torch.testing.assert_close(strategy.soup.rows[target], trained)


def test_fesem_keeps_a_center_that_no_reply_is_nearest_to():
    strategy = federated(make("fesem"), QUADRATICS, 3)
    before = strategy.soup.rows
    strategy.update(replies(strategy, QUADRATICS, [0, 3]))
    changed = (strategy.soup.rows != before).any(1)
    assert changed.sum() == 1
    assert changed[strategy.weights[0].argmax()]


def test_fesem_clusters_once_there_are_as_many_clients_as_clusters():
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
    # client 0 counts with its mean
    torch.testing.assert_close(strategy.served(0), 0.5 * (0.5 * (first[0] + moved) + first[3]))
    torch.testing.assert_close(strategy.served(1), first[1])
    torch.testing.assert_close(strategy.served(2), first[2])
    assert strategy.warnings() == []


def test_fesem_distinguishes_long_rows_at_small_distances():
    """Squared norms are 1e8 times the squared distances, beyond the precision of float32."""
    far = 1e4 * torch.ones(SIZE)
    strategy = make(FeSEMRecipe(name="fesem", adapters=2), lambda _: far, clients=30)
    close = [Quadratic(far + (1.0 if client % 2 else -1.0)) for client in range(30)]
    for _ in range(3):
        strategy.update(replies(strategy, close, range(30)))
    groups = strategy.weights.argmax(1)
    assert groups[0] != groups[1]
    assert torch.equal(groups, groups[:2].repeat(15))


def test_fesem_groups_by_the_distances_of_the_updates():
    """Two groups at y = ±1, spread evenly over x, whose variance is 1.2 times larger.

    Splitting by y reduces the squared distances by 1 for each client, and by x by 0.9. Rows of
    inner products as coordinates would weight the axes by their variances, and split by x.
    """
    x = torch.linspace(-1, 1, 8)
    x *= (1.2 / x.square().mean()).sqrt()
    targets = torch.zeros(16, SIZE)
    targets[:, 0], targets[:, 1] = x.repeat(2), torch.tensor([1.0, -1.0]).repeat_interleave(8)
    strategy = make(FeSEMRecipe(name="fesem", adapters=2), lambda _: torch.zeros(SIZE), clients=16)
    strategy.update(replies(strategy, [Quadratic(target) for target in targets], range(16)))
    groups = strategy.weights.argmax(1)
    assert groups[0] != groups[8]
    assert torch.equal(groups, groups[[0, 8]].repeat_interleave(8))


# ---- FL+HC ---------------------------------------------------------------------------------------


def test_flhc_is_fedavg_before_the_clustering_and_fedavg_within_clusters_after_it():
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


def test_flhc_clusters_by_the_last_update_of_every_client_of_the_warm_rounds():
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


def test_flhc_clusters_once_there_are_as_many_clients_as_clusters():
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

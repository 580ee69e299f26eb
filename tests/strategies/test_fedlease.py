"""FedLEASE: the number of experts, their members and their training, on formula clients."""

import pytest
import torch

from fedmerge_peft import AdapterLayout, RecipeError, federate
from fedmerge_peft.strategies.fedlease import clusters_by_silhouette

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])


@pytest.fixture
def grouped(formulas):
    """Eight clients in three groups, whose sizes do not matter."""
    case = formulas(8, sizes=[10, 20, 30, 40, 50, 60, 70, 80])
    noise = torch.randn(case.centers.shape, generator=torch.Generator().manual_seed(1))
    case.centers = case.centers[GROUPS] + 0.2 * noise
    return case


def member_means(case, clients=range(8)):
    """Mean of c over the group of each client, among some clients, ``(8, P)``."""
    known = torch.zeros(8, dtype=torch.bool)
    known[list(clients)] = True
    return torch.stack([case.centers[known & (group == GROUPS)].mean(0) for group in GROUPS])


@pytest.mark.parametrize("adapters", [3, 5, 8])
def test_there_are_as_many_experts_as_groups_and_each_is_the_mean_of_its_members(grouped, adapters):
    strategy = grouped.strategy("fedlease", adapters=adapters)
    for client in range(8):
        torch.testing.assert_close(strategy.served(client), grouped.fresh_row(0))
    for _ in range(2):
        grouped.round(strategy)
        assert strategy.experts == 3
        for client, expected in enumerate(member_means(grouped)):
            torch.testing.assert_close(strategy.served(client), expected)
    rows = strategy.soup.rows
    torch.testing.assert_close(rows[3:], rows[:3].mean(0).expand(adapters - 3, -1))
    assert strategy.warnings() == []


def test_the_distance_is_the_mean_over_layers_of_one_minus_the_cosine_of_b(grouped):
    """A and heads do not count, and neither does the size of a layer."""
    strategy = grouped.strategy("fedlease")
    start = grouped.fresh_row(0)
    distances = strategy.distances(start - grouped.centers)
    one, other = (grouped.layout.state_dict(row) for row in grouped.centers[:2])
    cosines = [
        torch.cosine_similarity(one[key].flatten(), other[key].flatten(), dim=0)
        for key in ("one.lora_B.weight", "two.lora_B.weight")
    ]
    assert float(distances[0, 1]) == pytest.approx(float(1 - sum(cosines) / 2), abs=1e-5)
    assert not distances.diagonal().any()


def test_only_the_warm_up_has_more_passes(grouped):
    strategy = grouped.strategy("fedlease", warm_passes=3)
    assert strategy.plan(0).phases == (None, None, None)
    grouped.round(strategy)
    assert strategy.plan(0).phases == (None,)


def test_the_rounds_after_the_clustering_go_through_the_server_optimizer(grouped):
    """Clients reach c in every round, so the gradient of an expert is Θ_j − mean of c."""
    strategy = grouped.strategy("fedlease", server_lr=0.5, server_momentum=0.5)
    means = member_means(grouped)
    grouped.round(strategy)  # the first means are exact
    torch.testing.assert_close(strategy.served(0), means[0])
    moved = means[0] + 1.0
    strategy.soup.rows = strategy.soup.rows + 1.0
    grouped.round(strategy)
    torch.testing.assert_close(strategy.served(0), moved - 0.5)
    grouped.round(strategy)
    torch.testing.assert_close(strategy.served(0), moved - 0.5 - 0.5 * (0.5 + 0.5 * 1.0))


def test_clients_are_clustered_once_enough_have_replied(grouped):
    strategy = grouped.strategy("fedlease", adapters=4)
    grouped.round(strategy, [0, 1, 2])
    assert strategy.warnings() == [
        "until clients are clustered, all are served the initial adapter; clients still needed: 2"
    ]
    torch.testing.assert_close(strategy.served(0), grouped.fresh_row(0))
    grouped.round(strategy, [3, 4, 6])
    expected = member_means(grouped, [0, 1, 2, 3, 4, 6])
    for client in (0, 1, 2, 3, 4, 6):
        torch.testing.assert_close(strategy.served(client), expected[client])
    mean = strategy.soup.rows[:3].mean(0)
    for client in (5, 7):  # newcomers
        torch.testing.assert_close(strategy.served(client), mean)
    before = strategy.soup.rows.clone()
    grouped.round(strategy, [5, 7])
    torch.testing.assert_close(strategy.soup.rows, before)
    assert strategy.clusters[5] == strategy.clusters[0]
    assert strategy.clusters[7] == strategy.clusters[1]
    grouped.round(strategy, [1, 7])
    torch.testing.assert_close(strategy.served(4), grouped.centers[[1, 7]].mean(0))


def test_as_many_clients_as_experts_are_not_enough_for_a_silhouette(grouped):
    strategy = grouped.strategy("fedlease", adapters=2)
    grouped.round(strategy, [0, 1])
    assert strategy.experts == 1
    assert strategy.warnings()[0].endswith("clients still needed: 1")
    grouped.round(strategy, [4])
    assert strategy.experts == 2
    torch.testing.assert_close(strategy.served(1), grouped.centers[[1, 4]].mean(0))


@pytest.mark.parametrize(("clients", "adapters"), [(1, 5), (2, 5), (4, 1)])
def test_without_a_silhouette_there_is_one_expert(formulas, clients, adapters):
    case = formulas(clients)
    strategy = case.strategy("fedlease", adapters=adapters)
    case.round(strategy)
    assert strategy.experts == 1
    for client in range(clients):
        torch.testing.assert_close(strategy.served(client), case.mean())


def test_the_silhouette_chooses_the_number_of_clusters():
    points = torch.tensor([0.0, 0.1, 5.0, 5.1, 5.2, 9.0, 9.1]).double()
    distances = (points[:, None] - points).abs()
    clusters = clusters_by_silhouette(distances, 6)
    assert len(clusters.unique()) == 3
    assert [len(clusters[part].unique()) for part in (slice(2), slice(2, 5), slice(5, 7))] == [
        1
    ] * 3
    assert len(clusters_by_silhouette(distances, 2).unique()) == 2


def test_equal_clients_are_clustered_without_an_error():
    assert len(clusters_by_silhouette(torch.zeros(4, 4).double(), 3)) == 4


def test_the_order_of_replies_does_not_matter(grouped):
    one, other = grouped.strategy("fedlease"), grouped.strategy("fedlease")
    for _ in range(2):
        one.update(list(grouped.replies(one)))
        other.update(list(grouped.replies(other))[::-1])
    assert torch.equal(one.soup.rows, other.soup.rows)
    assert torch.equal(one.clusters, other.clusters)


def test_fedlease_needs_a_b(formulas):
    case = formulas(3, AdapterLayout.from_tensors([("a.lora_A.weight", (2, 3), "lora")]))
    with pytest.raises(RecipeError, match=r"strategy.name: fedlease compares the clients' B"):
        case.strategy("fedlease")


def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path):
    run = federate(smoke("strategy=fedlease"), tmp_path / "run", engine=smoke_engine)
    size = 6 * 4 * smoke_engine.backbone.layout.size
    assert [(record["bytes_down"], record["bytes_up"]) for record in run.records] == 2 * [
        (size, size)
    ]
    assert run.soup.rows.isfinite().all()
    assert all(record["gap"] >= 0 for record in run.records)

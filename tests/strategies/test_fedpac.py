"""FedPAC: centroids, the combination of heads, and its plans, on formula clients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmerge_peft import AdapterLayout, RecipeError, federate
from fedmerge_peft.federation.reply_checks import validate_reply
from fedmerge_peft.sites.prepare import federated_recipe
from fedmerge_peft.strategies.fedpac import head_weights, least_quadratic
from fedmerge_peft.training.features import summed_by_class

CLASSES, WIDTH = 2, 3  # of the head of formula clients
COUNTS = torch.tensor([[6, 4], [2, 18], [0, 30]])


def features(client, row):
    """Features and labels of a client's examples with an adapter: its body moves all of them."""
    noise = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(client)).double()
    labels = torch.arange(CLASSES).repeat_interleave(COUNTS[client])
    corners = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]).double()
    return noise[: len(labels)] + corners[labels] + row[:WIDTH].double(), labels


def head_of(layout):
    """A mask ``(P,)`` of the head."""
    mask = torch.zeros(layout.size, dtype=torch.bool)
    mask[layout.columns("head")] = True
    return mask


@pytest.fixture
def case(formulas):
    case = formulas(3, sizes=COUNTS.sum(1).tolist())
    case.statistics = lambda client, row: summed_by_class(*features(client, row), CLASSES)
    return case


def test_the_body_is_averaged_and_centroids_are_the_means_of_the_trained_features(case):
    strategy = case.strategy("fedpac")
    body = ~head_of(case.layout)
    case.round(strategy)
    for client in range(3):
        torch.testing.assert_close(strategy.served(client)[body], case.mean()[body])
    parts = [features(client, case.centers[client]) for client in range(3)]
    values, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    expected = torch.stack([values[labels == label].mean(0) for label in range(CLASSES)])
    torch.testing.assert_close(strategy.centroids, expected.float())


def test_each_head_is_the_combination_with_the_least_variance_and_bias(case):
    """The objective of the paper, computed from the examples, is lowest at the weights found."""
    statistics = torch.stack([case.statistics(c, case.fresh_row(0)) for c in range(3)]).double()
    weights = head_weights(statistics)
    means, variances = [], []
    for client in range(3):
        values, labels = features(client, case.fresh_row(0))
        own = torch.stack([values[labels == k].sum(0) / len(values) for k in range(CLASSES)])
        means.append(own)
        variances.append((values.square().sum(1).mean() - own.square().sum()) / len(values))

    def objective(own, alpha):
        combined = sum(a * mean for a, mean in zip(alpha, means, strict=True))
        variance = sum(a**2 * v for a, v in zip(alpha, variances, strict=True))
        return float(variance + (means[own] - combined).square().sum())

    steps = np.linspace(0, 1, 41)
    grid = [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1 + 1e-9]
    for client in range(3):
        best = min(objective(client, alpha) for alpha in grid)
        assert objective(client, weights[client].tolist()) <= best + 1e-6
        assert float(weights[client].sum()) == pytest.approx(1)
        assert bool((weights[client] >= 0).all())
    assert float(weights[0, 0]) > 0.5  # the only client with this mixture of labels

    strategy, head = case.strategy("fedpac"), head_of(case.layout)
    case.round(strategy)
    for client in range(3):
        expected = weights[client].float() @ case.centers[:, head]
        torch.testing.assert_close(strategy.served(client)[head], expected)


def test_equal_distributions_combine_heads_by_inverse_variance():
    """Without bias, α_j is proportional to 1 / v_j: the larger client has the larger weight."""
    one = torch.tensor([[4.0, 40.0, 4.0, 0.0], [4.0, 40.0, 0.0, 4.0]]).double()
    weights = head_weights(torch.stack([one, 3 * one]))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]] * 2).double())


def test_the_quadratic_program_has_its_closed_form():
    matrix = np.diag([1.0, 2.0, 4.0])
    assert least_quadratic(matrix) == pytest.approx(np.array([4, 2, 1]) / 7)
    bound = np.array([[1.0, 2.0], [2.0, 8.0]])  # the unconstrained solution has a negative part
    assert least_quadratic(bound) == pytest.approx([1, 0])
    assert least_quadratic(np.zeros((3, 3))) == pytest.approx([1 / 3] * 3)
    singular = least_quadratic(np.ones((4, 4)))
    assert singular.sum() == pytest.approx(1)


def test_the_head_trains_before_the_body_which_is_drawn_to_known_centroids(case):
    strategy = case.strategy("fedpac", alignment=0.5)
    head = head_of(case.layout)
    plan = strategy.plan(0)
    assert torch.equal(torch.stack(plan.phases), torch.stack([head, ~head]))
    assert plan.alignment is None
    assert strategy.traffic(0) == (case.layout.size, case.layout.size + 2 * CLASSES * (WIDTH + 2))
    case.round(strategy)
    plan = strategy.plan(0)
    assert plan.alignment.strength == 0.5
    assert torch.equal(plan.alignment.centroids, strategy.centroids)
    assert strategy.traffic(0)[0] == case.layout.size + CLASSES * WIDTH


def test_classes_keep_their_centroid_and_absent_clients_their_head(case):
    strategy, head = case.strategy("fedpac"), head_of(case.layout)
    case.round(strategy, [2])  # has no example of the first class
    assert bool(strategy.centroids[0].isnan().all())
    assert bool(strategy.centroids[1].isfinite().all())
    torch.testing.assert_close(strategy.served(0)[head], case.fresh_row(0)[head])
    case.round(strategy, [0, 1])
    before = strategy.centroids.clone()
    own = strategy.served(0)[head]
    case.round(strategy, [2])
    torch.testing.assert_close(strategy.centroids[0], before[0])
    torch.testing.assert_close(strategy.served(0)[head], own)


def test_the_order_of_replies_does_not_matter_and_the_state_resumes(case):
    one, other = case.strategy("fedpac"), case.strategy("fedpac")
    one.update(list(case.replies(one)))
    other.update(list(case.replies(other))[::-1])
    assert torch.equal(one.soup.rows, other.soup.rows)
    resumed = case.strategy("fedpac")
    resumed.soup = one.soup
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(resumed.plan(1).alignment.centroids, one.centroids)


def test_replies_without_valid_statistics_are_refused(case):
    strategy = case.strategy("fedpac")
    plan = strategy.plan(0)
    reply = case.reply(0, plan)
    assert validate_reply(reply, plan, 1, 10) is None
    missing = replace(reply, statistics=None)
    assert validate_reply(missing, plan, 1, 10) == "its class statistics are missing"
    other = replace(reply, statistics=reply.statistics[:1])
    assert "class statistics" in validate_reply(other, plan, 1, 10)
    nan = replace(reply, statistics=reply.statistics * torch.nan)
    assert validate_reply(nan, plan, 1, 10) == "its class statistics are not finite"
    wrong = replace(reply, statistics=reply.statistics * 2)
    assert "class statistics have the sum 20, expected 10" in validate_reply(wrong, plan, 1, 10)


def test_formula_clients_spread_their_examples_over_the_classes(formulas):
    clients = formulas(1, AdapterLayout.from_tensors([("head.weight", (5, 2), "head")]), sizes=[9])
    counts = clients.statistics(0, clients.fresh_row(0))[:, 0]
    assert counts.tolist() == [2, 2, 2, 2, 1]


def test_fedpac_needs_a_classifier_and_its_clients_in_one_process(formulas, smoke):
    body = AdapterLayout.from_tensors([("a.lora_A.weight", (2, 3), "lora")])
    with pytest.raises(RecipeError, match=r"strategy.name: fedpac combines the heads"):
        formulas(3, body).strategy("fedpac")
    with pytest.raises(RecipeError, match=r"fedpac needs statistics of the clients' features"):
        federated_recipe(smoke("strategy=fedpac"))


def test_two_rounds_on_a_tiny_model(smoke, smoke_engine, tmp_path):
    run = federate(smoke("strategy=fedpac"), tmp_path / "run", engine=smoke_engine)
    layout = smoke_engine.backbone.layout
    classes, width = layout.classifier.shape
    up = 6 * 4 * (layout.size + 2 * classes * (width + 2))
    down = [6 * 4 * (layout.size + known * classes * width) for known in (0, 1)]
    assert [record["bytes_up"] for record in run.records] == [up, up]
    assert [record["bytes_down"] for record in run.records] == down
    assert run.soup.rows.isfinite().all()
    body = run.soup.rows[:, ~head_of(layout)]
    assert torch.equal(body, body[:1].expand_as(body))

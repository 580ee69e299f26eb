"""One vote for clients with similar updates: the rule, and attacks that the cosine filter loses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equality import assert_near
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.similarity_filter import (
    excess_similarity,
    similarity_filter_weights,
)

pytestmark = pytest.mark.equality

SIZE = 400


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def honest(count, seed=0):
    """Updates of length 1 with a common direction, ``(count, P)``; their cosines are near 0.2."""
    common = unit(random(1, SIZE, seed=100 + seed))
    return unit(common + 2 * unit(random(count, SIZE, seed=seed)))


def combine(rule, deltas, weights=None):
    aggregator = Aggregator(RobustnessRecipe(aggregation=rule, norm_multiple=1))
    weights = torch.ones(len(deltas), 1) if weights is None else weights
    return aggregator.combine(aggregator.clip(deltas), weights, torch.ones(len(deltas)))


def along(found, expected):
    return float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


# ---- the rule ------------------------------------------------------------------------------------


def test_similarity_beyond_the_upper_quartile_is_shared_known_answer():
    """Cosines .2 and, for one pair of four clients, .9; one client opposes the others.

    Sorted, the cosines of the 12 pairs are 6 × −.1, 4 × .2, 2 × .9, so that t = .2 and
    κ_01 = .7 / .8 = .875. Clients 0 and 1 have 1 / 1.875 of a vote, the others one.
    """
    c = torch.tensor(
        [
            [1.0, 0.9, 0.2, -0.1],
            [0.9, 1.0, 0.2, -0.1],
            [0.2, 0.2, 1.0, -0.1],
            [-0.1, -0.1, -0.1, 1.0],
        ],
        dtype=torch.float64,
    )
    shared = torch.eye(4).double()
    shared[0, 1] = shared[1, 0] = 0.875
    assert_near(excess_similarity(c), shared)
    expected = torch.tensor([1 / 1.875, 1 / 1.875, 1.0, 0.0], dtype=torch.float64)
    found = similarity_filter_weights(c, torch.full((4,), 0.25).double())
    assert_near(found, expected / expected.sum())


def test_the_weights_equal_a_slow_recomputation():
    deltas, w = honest(7).double(), unit(random(1, 7, seed=3).abs() + 1)[0].double()
    deltas[1] = deltas[0] + 0.1 * deltas[2]
    deltas[6] *= -1
    w = w / w.sum()
    c = [[along(a, b) for b in deltas] for a in deltas]
    pairs = torch.tensor(
        [c[i][k] for i in range(7) for k in range(7) if i != k], dtype=torch.float64
    )
    t = max(0.0, float(pairs.quantile(0.75)))
    kappa = [
        [1.0 if i == k else max(0.0, c[i][k] - t) / (1 - t) for k in range(7)] for i in range(7)
    ]
    s = [float(w[i]) / sum(kappa[i]) for i in range(7)]
    for i in range(7):
        if sum(abs(s[k]) * c[i][k] for k in range(7) if k != i) <= 0:
            s[i] = -s[i]
    kept = torch.tensor([max(0.0, share) for share in s], dtype=torch.float64)
    assert [i for i in range(7) if s[i] < 0] == [6]
    found = similarity_filter_weights(torch.tensor(c, dtype=torch.float64), w)
    assert_near(found, kept / kept.sum())


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_copies_of_one_update_have_the_weight_of_one_client(copies):
    deltas = torch.cat([honest(8), honest(9)[8:].expand(copies, SIZE)])
    c = unit(deltas.double()) @ unit(deltas.double()).T
    found = similarity_filter_weights(c, torch.full((8 + copies,), 1 / (8 + copies)).double())
    assert_near(found[8:], found[8].expand(copies))
    assert 0 < float(found[8:].sum()) < 1.5 * float(found[:8].mean())


def test_clients_with_one_common_update_all_count():
    one = random(1, SIZE)
    found = combine("similarity_filter", one.expand(7, SIZE))
    assert_near(found, one)


@pytest.mark.slow
def test_an_adapter_may_have_thousands_of_users():
    """Quantiles of more than 2²⁴ numbers are an error in torch."""
    c = torch.eye(4098, dtype=torch.float64)
    c[0, 1] = c[1, 0] = 0.5
    assert_near(excess_similarity(c), c)


@given(st.integers(3, 12), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_similarity_is_a_share(count, seed):
    deltas = random(count, 5, seed=seed).double()
    shared = excess_similarity(unit(deltas) @ unit(deltas).T)
    assert bool((shared >= 0).all())
    assert bool((shared <= 1).all())
    assert shared.diagonal().tolist() == [1.0] * count


# ---- attacks: 12 clients with updates of length 1, of which four collude -------------------------


@pytest.mark.parametrize("opposed", [0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_identical_vectors_at_the_norm_bound_have_no_effect(seed, opposed):
    """A third sends one vector whose cosine with the honest mean is −0.6 or −1.

    With the cosine filter, they turn the mean, or all updates oppose each other and none is left.
    """
    updates = honest(8, seed)
    mean = updates.mean(dim=0, keepdim=True)
    other = random(1, SIZE, seed=50 + seed)
    other = unit(other - other @ unit(mean).T * unit(mean))
    hostile = -opposed * unit(mean) + (1 - opposed**2) ** 0.5 * other
    deltas = torch.cat([hostile.expand(4, SIZE), updates])
    assert along(combine("cosine_filter", deltas), mean) < 0.5
    assert along(combine("similarity_filter", deltas), mean) > 0.99


@pytest.mark.parametrize("seed", range(3))
def test_colluders_as_similar_as_honest_clients_are_removed_if_they_oppose_them(seed):
    """They add noise, so that their cosines are those of honest clients."""
    updates = honest(8, seed)
    mean = updates.mean(dim=0, keepdim=True)
    hostile = unit(-unit(mean) + 2 * unit(random(4, SIZE, seed=50 + seed)))
    deltas = torch.cat([hostile, updates])
    assert along(combine("mean", deltas), mean) < 0.95
    assert along(combine("similarity_filter", deltas), mean) > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_identical_vectors_of_another_direction_count_as_one_client(seed):
    """No honest update opposes them. They move the mean as one client of nine, not four of 12."""
    updates = honest(8, seed)
    hostile = unit(random(1, SIZE, seed=50 + seed))
    deltas = torch.cat([hostile.expand(4, SIZE), updates])
    parts = {
        rule: float((combine(rule, deltas) @ hostile.T).squeeze())
        for rule in ("cosine_filter", "similarity_filter")
    }
    assert parts["similarity_filter"] < 0.5 * parts["cosine_filter"]


def test_a_small_group_of_honest_clients_keeps_at_least_one_vote():
    """Three of 15 have similar data. FoolsGold would remove them."""
    large, small = honest(12), honest(13, seed=0)[12:]
    small = unit(small + 0.5 * unit(random(3, SIZE, seed=9)))
    deltas = torch.cat([large, small])
    c = unit(deltas.double()) @ unit(deltas.double()).T
    assert float(c[12:, 12:][~torch.eye(3, dtype=torch.bool)].min()) > 2 * float(c[:12, :12].mean())
    found = similarity_filter_weights(c, torch.full((15,), 1 / 15).double())
    assert float(found[12:].sum()) > 1 / 15
    assert bool((found > 0).all())


def test_colluders_who_use_another_adapter_have_no_vote_on_this_one():
    updates = honest(8)
    hostile = unit(random(1, SIZE, seed=50))
    weights = torch.tensor([[0.05, 0.95]] * 4 + [[0.95, 0.05]] * 8)
    found = combine("similarity_filter", torch.cat([hostile.expand(4, SIZE), updates]), weights)
    assert along(found[0], updates.mean(dim=0)) > 0.95

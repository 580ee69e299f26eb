"""First merging weights after the grouping."""

import pytest
import torch
from torch.nn.functional import normalize

from fedmerge_peft.strategies.group_weights import affinities, first_logits
from fedmerge_peft.testing import FormulaClients

GROUPS = torch.tensor([0, 0, 0, 1, 1, 2])


def directions(spread=0.4):
    """Unit vectors in two groups and one alone, ``(6, 30)`` float64."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, 30, generator=generator, dtype=torch.float64)
    return normalize(centers[GROUPS] + spread * noise, dim=1)


def test_affinities_equal_a_slow_recomputation():
    units = directions()
    found = affinities(units @ units.T, GROUPS)
    for client in range(6):
        for group in range(3):
            others = [k for k in range(6) if GROUPS[k] == group and k != client]
            mean = units[others].mean(dim=0) if others else units[client]
            expected = float(units[client] @ mean / mean.norm())
            assert float(found[client, group]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weight", [0.4, 0.8, 0.95])
def test_the_mean_of_the_highest_weights_is_as_given(weight):
    units = directions()
    similar = affinities(units @ units.T, GROUPS)
    logits = first_logits(similar, weight)
    weights = torch.softmax(logits, dim=1)
    assert weights.argmax(dim=1).tolist() == similar.argmax(dim=1).tolist()
    assert float(weights.max(dim=1).values.mean()) == pytest.approx(weight)
    assert torch.allclose(torch.exp(logits).sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_client_between_two_groups_starts_between_them():
    similar = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.4]], dtype=torch.float64)
    weights = torch.softmax(first_logits(similar, 0.8), dim=1)
    assert float(weights[0, 0]) == pytest.approx(float(weights[1, 1]))
    assert 0.5 < float(weights[2, 0]) < float(weights[0, 0])


def test_clients_that_are_equally_similar_to_all_groups_start_evenly():
    similar = torch.ones(4, 2, dtype=torch.float64)
    logits = first_logits(similar, 0.8)
    assert torch.softmax(logits, dim=1).tolist() == [[0.5, 0.5]] * 4


@pytest.mark.parametrize("weight", [0.2, 0.8, 0.99])
@pytest.mark.parametrize("clear", [0, 1, 3])
def test_weights_are_positive_even_if_no_sharpness_reaches_the_mean(weight, clear):
    """Clients that resemble two groups equally, beside others that resemble one."""
    similar = torch.tensor([[0.9, -0.9, -0.9]] * clear + [[0.3, 0.3, -0.9]] * 3)
    logits = first_logits(similar.double(), weight)
    assert logits.isfinite().all()
    assert float(torch.softmax(logits, dim=1).min()) >= (1 - weight) / 6 - 1e-12


def test_clear_clients_have_even_weights_for_other_groups():
    similar = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]] * 0.9 + 0.05
    similar[:, 2] += torch.tensor([0.3, 0.0, 0.0, 0.3])  # clients 0 and 3 resemble group 2 a bit
    weights = torch.softmax(first_logits(similar, 0.8), dim=1)
    alone = torch.softmax(20 * similar, dim=1)
    assert float(weights[0, 1]) > 0.04 > float(alone[0, 1])  # about λ / 3


def test_fedmerge_starts_its_groups_with_these_weights():
    clients = FormulaClients(6)
    clients.centers = clients.centers[[0, 0, 0, 1, 1, 1]] + 0.3 * clients.centers
    strategy = clients.strategy("fedmerge", warm_rounds=1, warm_weight=0.7)
    clients.round(strategy)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert strategy.weights.argmax(dim=1).tolist() == groups.tolist()
    own = strategy.weights.gather(1, groups[:, None])
    assert float(own.mean()) == pytest.approx(0.7, abs=1e-6)
    assert float(own.max() - own.min()) > 1e-4  # clients differ in their similarity

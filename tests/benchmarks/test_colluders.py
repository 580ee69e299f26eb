"""Attacks of colluders on federations with made data, with and without defenses."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEED = 0


@pytest.fixture(scope="module")
def colluders():
    """The program, with the modules that it imports from its folder."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS / "quality"))
        patch.syspath_prepend(str(BENCHMARKS / "robustness"))
        import colluders

        yield colluders
    for name in ("attacks", "collusion", "colluders", "foolsgold", "made_clients", "provenance"):
        if name not in before:
            sys.modules.pop(name, None)


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=1)


def own_updates(count=6):
    draws = torch.Generator().manual_seed(0)
    common = unit(torch.randn(1, 200, generator=draws))
    return 3 * unit(common + unit(torch.randn(count, 200, generator=draws)))


def sent(colluders, attack, number=1, own=None):
    own = own_updates() if own is None else own
    return colluders.COLLUSIONS[attack].send(number, own, torch.Generator().manual_seed(1))


def mean_cosine(vectors):
    cosines = unit(vectors) @ unit(vectors).T
    return float(cosines[~torch.eye(len(vectors), dtype=torch.bool)].mean())


# ---- attacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "along"),
    [("identical vectors", -1.0), ("adapted to defense", -0.7), ("sideways", 0)],
)
def test_colluders_stay_at_the_norm_bound(colluders, attack, along):
    """Honest cosines are about 0.5, so that adapted updates have −√0.5 with the mean."""
    vectors, mean = sent(colluders, attack), unit(own_updates().mean(dim=0, keepdim=True))
    torch.testing.assert_close(vectors.norm(dim=1), torch.full((6,), 3.0))
    found = (unit(vectors) @ mean.T).flatten().tolist()
    assert found == pytest.approx([along] * 6, abs=0.15)


@pytest.mark.parametrize("attack", ["adapted to defense", "sideways"])
def test_adapted_colluders_are_as_similar_to_each_other_as_honest_clients(colluders, attack):
    assert mean_cosine(sent(colluders, attack)) == pytest.approx(
        mean_cosine(own_updates()), abs=0.1
    )


def test_alternating_colluders_are_honest_in_even_rounds(colluders):
    assert torch.equal(sent(colluders, "alternating", 2), own_updates())
    assert torch.equal(sent(colluders, "alternating", 3), sent(colluders, "identical vectors", 3))


def test_a_takeover_begins_with_honest_updates_and_ends_with_opposed_ones(colluders):
    assert torch.equal(sent(colluders, "takeover", 4), own_updates())
    torch.testing.assert_close(sent(colluders, "takeover", 5), 0.5 * own_updates())
    torch.testing.assert_close(sent(colluders, "takeover", 8), -own_updates())


def test_a_backdoor_changes_the_examples_of_colluders_alone(colluders):
    clean, poisoned = (colluders.MadeClients((3, 2), SEED) for _ in range(2))
    poisoned.hostile = [1]
    colluders.COLLUSIONS["backdoor"].poison(poisoned)
    changed = (clean.inputs != poisoned.inputs).any(dim=2)
    assert changed[1].nonzero().flatten().tolist() == list(range(15))
    assert not changed[[0, 2, 3, 4]].any()
    assert poisoned.labels[1, :15].tolist() == [0] * 15


# ---- defenses ------------------------------------------------------------------------------------


def outcome(colluders, federation, defense, attack=None, fraction=0.0, groups=None, seed=SEED):
    _, strategy, usual = getattr(colluders, federation)
    return colluders.outcome(
        strategy, groups or usual, colluders.DEFENSES[defense], seed, attack, fraction
    )


@pytest.mark.parametrize("attack", ["identical vectors", "adapted to defense"])
def test_thirty_percent_of_colluders_do_not_lower_accuracy_on_a_shared_adapter(colluders, attack):
    clean = outcome(colluders, "SHARED", "none").accuracy
    assert outcome(colluders, "SHARED", "none", attack, 0.3).accuracy < clean - 5
    assert outcome(colluders, "SHARED", "similarity filter", attack, 0.3).accuracy > clean - 3


def test_a_takeover_by_a_fifth_does_not_cost_a_group_its_adapter(colluders):
    """Seven honest clients of the group remain, and six colluders join them."""
    clean = outcome(colluders, "GROUPED", "none").groups[1]
    found = outcome(colluders, "GROUPED", "similarity filter", "takeover", 0.2).groups[1]
    assert found > clean - 6


def test_a_takeover_by_a_majority_of_a_group_costs_less_than_with_the_cosine_filter(colluders):
    """Six honest clients of the group remain, and nine colluders join them."""
    lost, kept = (
        outcome(colluders, "GROUPED", defense, "takeover", 0.3).groups[1]
        for defense in ("cosine filter", "similarity filter")
    )
    assert kept > lost + 8


@pytest.mark.parametrize(("size", "seed"), [(3, 0), (3, 2), (9, 0)])
def test_a_small_group_of_honest_clients_keeps_its_accuracy(colluders, size, seed):
    """With seed 2, the other clients all have the same labels, and oppose the group together."""
    groups = (size, (31 - size) // 2, (30 - size) // 2)
    free, defended = (
        outcome(colluders, "GROUPED", defense, groups=groups, seed=seed).groups[0]
        for defense in ("none", "similarity filter")
    )
    assert defended > free - 8


def test_foolsgold_removes_the_most_similar_clients(colluders):
    """Cosines .9 for one pair of three, else .1; α is .1, .1 and .9, and the weights follow."""
    c = torch.tensor([[-1.0, 0.9, 0.1], [0.9, -1.0, 0.1], [0.1, 0.1, -1.0]]).double()
    assert colluders.foolsgold.foolsgold_weights(c).tolist() == [0.0, 0.0, 1.0]
    apart = torch.tensor([[-1.0, 0.5, 0.1], [0.5, -1.0, 0.1], [0.1, 0.1, -1.0]]).double()
    # α / max α = .5 / .98: client 2 pardons itself to .1 · .1 / .5 = .02
    expected = torch.log(torch.tensor(0.5 / 0.48)) + 0.5
    found = colluders.foolsgold.foolsgold_weights(apart)
    assert found.tolist() == pytest.approx([float(expected), float(expected), 1.0])

"""Attacks of hostile clients, with and without robust aggregation."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.equality


def load_attacks():
    path = Path(__file__).parents[2] / "benchmarks" / "robustness" / "attacks.py"
    spec = importlib.util.spec_from_file_location("benchmark_attacks", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attacked(case, name, attack, hostile, *overrides, rounds=6):
    """Mean distance of the honest clients' adapters to their common minimum, after some rounds."""
    attacks = load_attacks()
    found = case.federation(
        f"strategy.name={name}", f"rounds={rounds}", "clients.failures=skip", *overrides
    )
    train_clients = found.engine.train_clients
    honest = [client for client in range(len(case.sizes)) if client not in hostile]
    known = {client: attacks.Adversary(0, honest[0], case.sizes[honest[0]]) for client in hostile}

    def with_attacks(number, assignments):
        for plan, reply in train_clients(number, assignments):
            answers = [reply]
            if reply.client in known:
                answers = attacks.ATTACKS[attack](reply, known[reply.client])
            yield from ((plan, answer) for answer in answers)

    found.engine.train_clients = with_attacks
    list(found.rounds())
    return max(float((found.strategy.adapter(client) - case.mean()).norm()) for client in honest)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["fedavg", "fedmerge"])
@pytest.mark.parametrize("attack", ["sign flip", "x100", "noise", "nan", "stale", "duplicate"])
def test_under_a_median_of_clipped_updates_attackers_hardly_move_honest_clients(
    formulas, attack, name, count
):
    case = formulas(10)
    case.centers = 5.0 + 0.1 * case.centers  # alike, so that there is an honest answer
    settings = ["strategy.adapters=2"] if name == "fedmerge" else []
    defended = attacked(
        case,
        name,
        attack,
        range(count),
        *settings,
        "robustness.aggregation=median",
        "robustness.norm_multiple=1",
    )
    far = float((case.fresh_row(0) - case.mean()).norm())
    assert defended < 0.3 * far


@pytest.mark.parametrize("attack", ["sign flip", "x100", "noise"])
def test_without_a_defence_three_of_ten_attackers_take_over(formulas, attack):
    case = formulas(10)
    case.centers = 5.0 + 0.1 * case.centers
    defended = attacked(
        case,
        "fedavg",
        attack,
        range(3),
        "robustness.aggregation=median",
        "robustness.norm_multiple=1",
    )
    assert attacked(case, "fedavg", attack, range(3)) > 3 * defended


def test_flipped_labels_are_those_of_the_hostile_clients_training_examples(smoke_engine):
    changed = load_attacks().flipped(smoke_engine, [1])
    before, after = (
        list(map(int, engine.runtime.examples.columns["labels"]))
        for engine in (smoke_engine, changed)
    )
    held = set(map(int, smoke_engine.clients[1].train))
    last = len(smoke_engine.task.labels) - 1
    assert after == [last - label if row in held else label for row, label in enumerate(before)]


def test_attackers_follow_from_the_seed():
    attackers = load_attacks().attackers
    assert [len(attackers(12, fraction, 0)) for fraction in (0.0, 0.1, 0.2, 0.3)] == [0, 1, 2, 4]
    assert attackers(12, 0.3, 0) == attackers(12, 0.3, 0) != attackers(12, 0.3, 1)

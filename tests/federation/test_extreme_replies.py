"""A round that would break the soup has no effect; declared sizes are not votes under a defense."""

import dataclasses
from contextlib import suppress

import pytest
import torch

from fedmerge_peft import (
    ClientError,
    DivergedError,
    RecipeError,
    Run,
    TooFewClientsError,
    resume,
)
from fedmerge_peft.federation import loop
from fedmerge_peft.federation.federate import run_recipe
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.saved_state import SavedState

SKIP = "clients.failures=skip"
DEFENDED = [entry.name for entry in STRATEGIES if entry.load().averages and entry.name != "fedpac"]
"""Strategies with a mean of updates that a defense can bound."""
RULES = ["median", "trimmed_mean", "krum", "multi_krum", "cosine_filter", "similarity_filter"]


def altered(found, culprit, change):
    """Change the replies of one client of a federation."""
    train_clients = found.engine.train_clients

    def train(number, assignments):
        for plan, reply in train_clients(number, assignments):
            yield plan, change(reply) if reply.client == culprit else reply

    found.engine.train_clients = train
    return found


def one_hot(reply, value):
    deltas = torch.zeros_like(reply.deltas)
    deltas[:, 0] = value
    return dataclasses.replace(reply, deltas=deltas)


EXTREMES = {
    "1e20": lambda reply: dataclasses.replace(reply, deltas=torch.full_like(reply.deltas, 1e20)),
    "one-hot 3e38": lambda reply: one_hot(reply, 3e38),
    "one-hot -1e10": lambda reply: one_hot(reply, -1e10),
}


@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
def test_a_client_with_an_extreme_update_is_left_out_by_name(formulas, name, change):
    found = altered(formulas(4).federation(f"strategy.name={name}", "rounds=3", SKIP), 2, change)
    for record in found.rounds():
        assert "its update is too large: its norm is" in record.failures["2"]
    assert found.strategy.soup.rows.isfinite().all()
    assert found.strategy.weights.isfinite().all()


def test_without_skip_the_error_names_the_client(formulas):
    found = altered(formulas(4).federation("strategy.name=fedavg"), 2, EXTREMES["1e20"])
    with pytest.raises(ClientError, match="client 2, round 1: its update is too large"):
        next(found.rounds())


def same_state(strategy, saved):
    now = SavedState.of(strategy)
    assert now.state.keys() == saved.state.keys()
    assert torch.equal(now.soup.rows, saved.soup.rows)
    for key, value in saved.state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(now.state[key], value)
        else:
            assert now.state[key] == value


def infinite_soup(strategy):
    strategy.soup.rows[0, 0] = torch.inf


def large_soup(strategy):
    strategy.soup.rows[0, 0] = 1e19


def weights_without_numbers(strategy):
    strategy.merging.logits[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (infinite_soup, "the soup would not be finite"),
        (large_soup, r"an adapter would have the norm 1e\+19"),
        (weights_without_numbers, "the weights would not be finite"),
    ],
)
def test_a_round_that_would_break_soup_or_weights_has_no_effect_and_names_its_causes(
    formulas, monkeypatch, spoil, fault
):
    found = formulas(4).federation("strategy.name=fedmerge", "strategy.start=independent")
    saved, norms = SavedState.of(found.strategy), list(found.strategy.aggregator.norms)
    monkeypatch.setattr(loop, "update_strategy", lambda name, strategy, replies: spoil(strategy))
    for _ in range(2):  # it can be repeated
        with pytest.raises(DivergedError, match=f"round 1: {fault}") as error:
            next(found.rounds())
        assert "The largest updates, by L2 norm, are those of" in str(error.value)
        same_state(found.strategy, saved)
        assert (found.completed, found.strategy.aggregator.norms) == (0, norms)


@pytest.mark.parametrize(
    "setting", ["server_lr=1e300", "weights_lr=1e300", "temperature=1e300", "temperature=1e-300"]
)
def test_settings_that_would_break_soup_or_weights_are_refused(formulas, setting):
    with pytest.raises(RecipeError, match=f"strategy.{setting.partition('=')[0]}"):
        formulas(4).federation("strategy.name=fedmerge", f"strategy.{setting}")


@pytest.mark.parametrize("setting", ["server_lr=100", "weights_lr=1e3", "temperature=1e-3"])
def test_with_extreme_settings_the_state_stays_finite(formulas, setting):
    found = formulas(4).federation(
        "strategy.name=fedmerge", f"strategy.{setting}", "rounds=8", SKIP
    )
    with suppress(DivergedError, TooFewClientsError):
        list(found.rounds())
    assert found.completed > 0
    assert found.strategy.soup.rows.isfinite().all()
    assert found.strategy.weights.isfinite().all()


@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
def test_after_a_failed_update_a_federation_continues_as_without_it(formulas, name, monkeypatch):
    case = formulas(5)
    plain, failing = (case.federation(f"strategy.name={name}", "rounds=4") for _ in range(2))
    expected = list(plain.rounds())
    records = []
    for number in range(1, 5):
        strategy = failing.strategy
        with monkeypatch.context() as patch:
            patch.setattr(SavedState, "fault_of_next", lambda *_: "no luck")
            with pytest.raises(DivergedError, match="no luck"):
                next(failing.rounds())
        assert failing.strategy is not strategy
        records.append(next(failing.rounds()))
        assert records[-1].round == number
    for record, other in zip(records, expected, strict=True):
        assert (record.train_loss, record.gap) == (other.train_loss, other.gap)
    assert torch.equal(failing.strategy.soup.rows, plain.strategy.soup.rows)
    assert torch.equal(failing.strategy.weights, plain.strategy.weights)


def test_a_refused_round_leaves_a_run_that_resumes(smoke, tmp_path, monkeypatch):
    recipe, out = smoke("strategy=fedavg", "rounds=3", "baselines=[]"), tmp_path / "run"
    fault_of_next = SavedState.fault_of_next

    calls = []

    def second(self, strategy):
        calls.append(1)
        return "no luck" if len(calls) == 2 else fault_of_next(self, strategy)

    monkeypatch.setattr(SavedState, "fault_of_next", second)
    with pytest.raises(DivergedError, match="round 2: no luck"):
        run_recipe(recipe, out, engine=None, callbacks=[])
    assert len(Run.open(out).records) == 1
    resume(out)
    assert len(Run.open(out).records) == 3


# ---- declared sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_under_a_defense_a_declared_size_is_no_vote(rule):
    """One of twelve declares 100 000 examples and sends the opposite of the honest direction."""
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(1, 40, generator=generator)
    deltas = honest + 0.5 * torch.randn(12, 40, generator=generator)
    deltas[0] = -honest[0]
    sizes = torch.tensor([100_000.0, *range(10, 21)], dtype=torch.float64)
    aggregator = Aggregator(RobustnessRecipe(aggregation=rule, norm_multiple=1.0))
    combined = aggregator.combine(aggregator.clip(deltas), torch.ones(12, 1), sizes)
    assert float(torch.cosine_similarity(combined, honest)) > 0.8


def test_votes_are_sizes_with_a_defense_at_most_their_median():
    sizes = torch.tensor([3.0, 1.0, 100.0, 4.0], dtype=torch.float64)
    assert Aggregator().votes(sizes).tolist() == sizes.tolist()
    defended = Aggregator(RobustnessRecipe(norm_bound=1.0))
    assert defended.votes(sizes).tolist() == [3.0, 1.0, 3.0, 3.0]
    assert defended.votes(defended.votes(sizes)).tolist() == [3.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize("name", DEFENDED)
@pytest.mark.parametrize("rule", ["", "strategy.rule=gradient"], ids=["default", "gradient"])
def test_no_strategy_gives_a_liar_more_votes_under_a_defense(formulas, name, rule):
    """A client that declares 10^9 examples moves soup and weights as one of the median size."""
    if rule and name != "fedmerge":
        pytest.skip("a rule of fedmerge")
    settings = [
        f"strategy.name={name}",
        "rounds=3",
        "robustness.norm_multiple=2",
        *filter(None, [rule]),
    ]
    states = []
    for declared in (10, 10**9):
        case = formulas(5, sizes=[10, 10, declared, 10, 10])
        found = case.federation(*settings)
        list(found.rounds())
        states.append((found.strategy.soup.rows, found.strategy.weights))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


def test_others_weights_move_as_far_if_one_declares_many_examples(formulas):
    """With ``rule: gradient``, the logits' steps are proportional to the clients' votes."""
    moved = []
    for declared in (10, 10**5):
        case = formulas(4, sizes=[10, 10, 10, declared])
        found = case.federation(
            "strategy.name=fedmerge",
            "strategy.rule=gradient",
            "strategy.start=independent",
            "rounds=2",
            "robustness.norm_multiple=2",
        )
        before = found.strategy.merging.logits.clone()
        list(found.rounds())
        moved.append(float((found.strategy.merging.logits - before)[:3].abs().max()))
    assert moved[0] == moved[1] > 0

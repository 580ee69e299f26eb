"""Client-level differential privacy: released updates, noise on sums, and the budget spent."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge_peft import Callback, Federation, Recipe, RecipeError, federate, resume
from fedmerge_peft.errors import RunError
from fedmerge_peft.federation.privacy_ledger import LEDGER_FILE, PrivacyLedger
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.strategies.aggregation import clipped
from fedmerge_peft.strategies.differential_privacy import (
    PrivateAggregator,
    epsilon_spent,
    update_privacy,
)
from fedmerge_peft.training.execute import run_plan
from fedmerge_peft.training.plan import Train, Trained
from fedmerge_peft.training.update_privacy import UpdatePrivacy

DP_ACCOUNTING = [(1, 1.993091), (3, 3.708635), (6, 5.544831), (7, 6.072396), (11, 7.955246)]
LOCAL, CENTRAL = "privacy.mode=local", "privacy.mode=central"


# ---- the accountant ------------------------------------------------------------------------------


def renyi(noise, rounds, delta):
    """min over α of ε_R(α) + log((α − 1)/α) − (log δ + log α)/(α − 1), with ε_R(α) = T α / (2 z²).

    Mironov 2017, arXiv 1702.07476, proposition 7; Balle et al. 2020, arXiv 1905.09982, theorem 21.
    """
    orders = [1 + x / 1000 for x in range(1, 100_000)]
    return min(
        rounds * a / (2 * noise**2)
        + math.log((a - 1) / a)
        - (math.log(delta) + math.log(a)) / (a - 1)
        for a in orders
    )


def exact(noise, rounds, delta):
    """The ε of T Gaussian mechanisms at δ; together they are one mechanism of noise z/√T.

    Balle and Wang 2018, arXiv 1805.06530, theorem 8.
    """
    phi, sigma = NormalDist().cdf, noise / math.sqrt(rounds)
    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        over = (
            phi(1 / (2 * sigma) - e * sigma) - math.exp(e) * phi(-1 / (2 * sigma) - e * sigma)
            > delta
        )
        low, high = (e, high) if over else (low, e)
    return high


@pytest.mark.parametrize(
    ("noise", "rounds", "delta"),
    [(1.0, 1, 1e-5), (2.0, 10, 1e-5), (5.0, 100, 1e-6), (0.8, 3, 1e-3), (60.0, 20, 1e-5)],
)
def test_epsilon_equals_the_formula_and_is_below_that_of_renyi_divergences(noise, rounds, delta):
    found = epsilon_spent(PrivacyRecipe(mode="local", noise=noise, delta=delta), rounds)
    assert found == pytest.approx(exact(noise, rounds, delta), rel=1e-6)
    assert found < renyi(noise, rounds, delta) < 1.25 * found


def test_clients_that_never_took_part_have_spent_nothing():
    assert epsilon_spent(PrivacyRecipe(mode="local"), 0) == 0.0


@pytest.mark.parametrize("mode", [LOCAL, CENTRAL])
def test_a_clients_epsilon_counts_its_own_rounds(formulas, mode):
    found = formulas(6).federation(
        "strategy=fedavg", mode, "clients.fraction=0.5", "rounds=8", "privacy.noise=3"
    )
    asked = [0] * 6
    for record in found.rounds():
        for client in found.cohort(record.round):
            asked[client] += 1
        assert record.epsilon == epsilon_spent(found.recipe.privacy, max(asked))
        assert f"ε {record.epsilon:.2f}" in str(record)
        assert record.noise == "simulation"
    assert max(asked) < 8


# ---- the ledger ----------------------------------------------------------------------------------


def private_recipe(*overrides):
    return Recipe.load("smoke", [LOCAL, "privacy.noise=2", "baselines=[]", *overrides])


# dp-accounting 0.6.0, PLDAccountant, GaussianDpEvent(2.0) composed as often, δ = 1e-5
@pytest.mark.parametrize(("releases", "epsilon"), DP_ACCOUNTING)
def test_the_epsilon_of_all_releases_equals_that_of_dp_accounting(releases, epsilon):
    ledger = PrivacyLedger(private_recipe(), 4, simulated=False)
    for number in range(releases):  # the rounds of a method, of a baseline, and one of them again
        ledger.charge("fedavg" if number % 3 else "fedprox", 1 + number // 4)
    assert ledger.epsilon == pytest.approx(epsilon, rel=1e-6)


def test_releases_of_all_methods_count(tmp_path):
    ledger = PrivacyLedger(private_recipe(), 4, simulated=True, directory=tmp_path)
    for method in ("fedmerge", "fedavg"):
        for number in (1, 2, 3):
            ledger.charge(method, number)
    assert ledger.epsilon == epsilon_spent(private_recipe().privacy, 6)
    again = PrivacyLedger(private_recipe(), 4, simulated=True, directory=tmp_path)
    assert again.epsilon == ledger.epsilon


@pytest.mark.parametrize("simulated", [True, False])
def test_a_repeated_round_counts_unless_its_noise_is_the_same(simulated, tmp_path):
    privacy = private_recipe().privacy
    ledger = PrivacyLedger(private_recipe(), 4, simulated=simulated, directory=tmp_path)
    for number in (1, 2, 3):
        ledger.charge("fedavg", number)
    resumed = PrivacyLedger(private_recipe(), 4, simulated=simulated, directory=tmp_path)
    resumed.begin("fedavg", 1)  # the checkpoints after it are lost
    resumed.charge("fedavg", 2)
    assert resumed.epsilon == epsilon_spent(privacy, 2 if simulated else 4)
    resumed.charge("fedavg", 3)
    assert resumed.epsilon == epsilon_spent(privacy, 3 if simulated else 5)


def test_completed_rounds_count_even_without_a_file():
    ledger = PrivacyLedger(private_recipe(), 4, simulated=False)
    ledger.begin("fedavg", 5)
    assert ledger.epsilon == epsilon_spent(private_recipe().privacy, 5)


@pytest.mark.parametrize("text", ["{", "{}", '{"releases": {"a": [-1]}}', '{"releases": [1]}'])
def test_a_damaged_ledger_is_named(text, tmp_path):
    (tmp_path / LEDGER_FILE).write_text(text)
    message = (
        rf"{LEDGER_FILE} is damaged: .*; ε is unknown without this file\. Restore the file .*run$"
    )
    with pytest.raises(RunError, match=message):
        PrivacyLedger(private_recipe(), 4, simulated=True, directory=tmp_path)


# ---- released updates ----------------------------------------------------------------------------


def sent(delta, privacy, phases=(None,), seed=5):
    """The released reply, and the row kept, of a client that training moves by δ."""
    row = torch.zeros_like(delta)
    plan = Train(row, phases, privacy=privacy)
    result = run_plan(plan, seed, lambda job, _: Trained(job.row - delta, 1.0, 1), None)
    return result.deltas[0], result.trained


def test_a_released_update_is_clipped_and_the_clients_own_row_is_not():
    delta = torch.tensor([3.0, 4.0])
    returned, kept = sent(delta, UpdatePrivacy(1.0, 0.0))
    torch.testing.assert_close(returned, delta / 5)
    assert torch.equal(kept, -delta)
    assert torch.equal(sent(delta, UpdatePrivacy(6.0, 0.0))[0], delta)


def test_the_noise_of_a_released_update_is_gaussian_of_its_size_and_another_for_each_seed():
    delta = torch.zeros(100_000)
    noise = sent(delta, UpdatePrivacy(1.0, 0.3))[0]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.005)
    assert float((noise.abs() < 0.3).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert torch.equal(noise, sent(delta, UpdatePrivacy(1.0, 0.3))[0])
    other = sent(delta, UpdatePrivacy(1.0, 0.3), seed=6)[0]
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02


def test_columns_that_do_not_train_get_no_noise():
    mask = torch.tensor([True, False, False])
    returned, _ = sent(torch.zeros(3), UpdatePrivacy(1.0, 1.0), (mask, mask.roll(1)))
    assert (returned != 0).tolist() == [True, True, False]


def test_local_noise_is_in_units_of_how_far_two_clipped_updates_can_be_apart():
    assert update_privacy(PrivacyRecipe(mode="local", clip=0.5, noise=3.0)) == UpdatePrivacy(
        0.5, 3.0
    )
    assert update_privacy(PrivacyRecipe(mode="central", clip=0.5, noise=3.0)) == UpdatePrivacy(
        0.5, 0.0
    )
    assert update_privacy(PrivacyRecipe()) is None


# ---- noise on the sums ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.01, 5.0))
def test_a_client_moves_all_sums_together_by_no_more_than_their_sensitivity(
    clients, adapters, seed, sharpness
):
    """‖f(all) − f(all but one)‖ ≤ S for every missing client; both have the same noise."""
    generator = torch.Generator().manual_seed(seed)
    deltas = clipped(5 * torch.randn(clients, 6, generator=generator), 1.0)
    weights = torch.softmax(
        sharpness * torch.randn(clients, adapters, generator=generator).double(), dim=1
    )
    rule = PrivateAggregator(PrivacyRecipe(mode="central", noise=1e-3), cohort_size=clients, seed=0)
    whole = rule.combine(deltas, weights, torch.ones(clients))
    for missing in range(clients):
        rest = [client for client in range(clients) if client != missing]
        without = rule.combine(deltas[rest], weights[rest], torch.ones(len(rest)))
        assert float((whole - without).norm()) <= rule.sensitivity(adapters) * (1 + 1e-5)


@pytest.mark.parametrize(("adapters", "sensitivity"), [(1, 0.05), (4, 0.4)])
def test_sums_get_noise_of_z_times_their_sensitivity(adapters, sensitivity):
    rule = PrivateAggregator(
        PrivacyRecipe(mode="central", noise=2.0, clip=0.5), cohort_size=10, seed=0
    )
    assert rule.sensitivity(adapters) == sensitivity
    found = rule.combine(
        torch.zeros(10, 50_000), torch.full((10, adapters), 1 / adapters), torch.ones(10)
    )
    assert float(found.std()) == pytest.approx(2.0 * sensitivity, rel=0.02)


def test_each_round_has_its_own_noise():
    rule = PrivateAggregator(PrivacyRecipe(mode="central"), cohort_size=3, seed=0)
    found = []
    for _ in range(2):
        rule.clip(torch.zeros(3, 4))
        found.append(rule.combine(torch.zeros(3, 4), torch.ones(3, 1), torch.ones(3)))
    assert not torch.equal(*found)


@pytest.mark.parametrize("mode", [LOCAL, CENTRAL])
@pytest.mark.parametrize("name", ["fedavg", "rolora"])
def test_with_little_noise_and_a_wide_bound_the_result_is_the_mean(formulas, name, mode):
    case = formulas(4)
    private = case.federation(
        f"strategy={name}", mode, "privacy.clip=30", "privacy.noise=1e-3", "rounds=2"
    )
    list(private.rounds())
    torch.testing.assert_close(private.strategy.soup.rows[0], case.mean(), rtol=0, atol=0.2)


# ---- supported methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ditto", "fedrep", "fedem", "ifca", "flora", "fedavg_ft"])
@pytest.mark.parametrize("mode", [LOCAL, CENTRAL])
def test_a_method_that_shares_more_than_is_noised_is_refused(strategy, mode):
    with pytest.raises(RecipeError, match=rf"does not protect everything that {strategy} shares"):
        Recipe.load("smoke", [f"strategy={strategy}", mode, "baselines=[]"])
    with pytest.raises(RecipeError, match=rf"not protect everything that {strategy} shares"):
        Recipe.load("smoke", [f"baselines=[{strategy}]", mode])


@pytest.mark.parametrize(
    "setting", ["start=warm", "rule=paper", "rule=gradient", "reseed_after=2", "balance_rounds=1"]
)
def test_weights_that_depend_on_other_clients_are_refused_with_noise_on_sums(setting):
    with pytest.raises(
        RecipeError, match="by the updates of other clients, which central noise does not protect"
    ):
        Recipe.load("smoke", [f"strategy.{setting}", CENTRAL])
    Recipe.load("smoke", [f"strategy.{setting}", LOCAL])


def test_a_sum_of_updates_for_each_block_is_refused_with_noise_on_one_sum():
    settings = ["strategy.start=independent", "strategy.blocks=head"]
    with pytest.raises(RecipeError, match="blocks: head uses a sum of updates for each block"):
        Recipe.load("smoke", [*settings, CENTRAL])
    Recipe.load("smoke", [*settings, LOCAL])


def test_central_noise_and_a_defence_exclude_each_other():
    with pytest.raises(RecipeError, match="remove robustness"):
        Recipe.load("smoke", [CENTRAL, "robustness.norm_multiple=1"])
    Recipe.load("smoke", [LOCAL, "robustness.aggregation=median"])


def test_local_training_shares_nothing_and_gets_no_noise(smoke, smoke_engine):
    plain, private = (
        Federation(smoke("strategy=local", *more), smoke_engine) for more in ([], [LOCAL])
    )
    records = list(private.rounds())
    list(plain.rounds())
    assert torch.equal(plain.strategy.soup.rows, private.strategy.soup.rows)
    assert records[-1].epsilon is None


@pytest.mark.parametrize("strategy", ["ffa_lora", "{name: fedmerge, start: independent}"])
@pytest.mark.parametrize("mode", [LOCAL, CENTRAL])
def test_noise_is_on_all_sent_columns_and_on_no_others(formulas, strategy, mode):
    found = formulas(3).federation(f"strategy={strategy}", mode)
    before = found.strategy.soup.rows.clone()
    list(found.rounds())
    moved = (found.strategy.soup.rows != before).any(dim=0)
    assert torch.equal(
        moved, found.strategy.columns if strategy == "ffa_lora" else torch.ones_like(moved)
    )


@pytest.mark.parametrize("mode", [LOCAL, CENTRAL])
def test_a_private_run_records_its_epsilon_and_resumes_to_the_same_bits(
    smoke, smoke_engine, tmp_path, left_behind, mode
):
    recipe = smoke("rounds=4", mode, "privacy.noise=4", "clients.fraction=0.5")

    def interrupt(record):
        if record.round == 2:
            raise KeyboardInterrupt

    run = federate(recipe, tmp_path / "whole", engine=smoke_engine)
    assert run.summary["privacy"] == {
        "epsilon": run.records[-1]["epsilon"],
        "delta": 1e-5,
        "noise": "simulation",
    }
    assert run.summary["best"] is None  # a choice by scores without noise
    with pytest.raises(KeyboardInterrupt):
        federate(
            recipe,
            tmp_path / "parts",
            engine=smoke_engine,
            callbacks=[Callback(on_round=interrupt)],
        )
    resume(tmp_path / "parts", engine=smoke_engine)
    assert left_behind(tmp_path / "parts") == left_behind(tmp_path / "whole")


def test_a_run_with_baselines_states_the_epsilon_of_all_of_its_updates(
    smoke, smoke_engine, tmp_path
):
    recipe = smoke("strategy=fedavg", "baselines=[fedprox, local]", "rounds=3", LOCAL)
    run = federate(recipe, tmp_path / "run", engine=smoke_engine)
    epsilons = [epsilon_spent(recipe.privacy, releases) for releases in range(7)]
    assert [record["epsilon"] for record in run.records] == epsilons[1:4]
    assert [record["epsilon"] for record in run.baselines["fedprox"].records] == epsilons[4:]
    assert run.summary["privacy"]["epsilon"] == epsilons[6]
    assert run.baselines["local"].summary["privacy"] is None


def test_the_best_round_is_not_chosen_by_scores_without_noise(smoke):
    with pytest.raises(RecipeError, match="by scores without noise"):
        smoke("evaluation.serve=best", LOCAL, "strategy=fedavg")


def test_noise_on_sums_outside_simulations_follows_from_no_seed():
    recipe = PrivacyRecipe(mode="central", noise=1.0, clip=1.0)
    found = [
        PrivateAggregator(recipe, cohort_size=4, seed=seed).combine(
            torch.zeros(4, 50_000), torch.ones(4, 1), torch.ones(4)
        )
        for seed in (None, None, 0, 0)
    ]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert float(found[0].std()) == pytest.approx(0.25, rel=0.02)

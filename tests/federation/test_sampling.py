"""Poisson samples of clients, and the privacy that secret ones add."""

import pytest
import torch

from fedmerge_peft import Recipe
from fedmerge_peft.federation.cohorts import cohort
from fedmerge_peft.federation.privacy_ledger import PrivacyLedger
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.strategies.differential_privacy import PrivateAggregator, epsilon_spent

LOCAL, CENTRAL = "privacy.mode=local", "privacy.mode=central"
POISSON = ["clients.sampling=poisson", "clients.fraction=0.25"]


# dp-accounting 0.6.0, PLDAccountant, PoissonSampledDpEvent(q, GaussianDpEvent(z)), δ = 1e-5
@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "epsilon"), [(1.0, 0.1, 20, 3.59074), (2.0, 0.25, 50, 4.4403)]
)
def test_the_epsilon_of_secret_samples_is_an_upper_bound_within_a_hundredth(
    noise, rate, rounds, epsilon
):
    privacy = PrivacyRecipe(mode="central", noise=noise)
    found = epsilon_spent(privacy, rounds, rate)
    assert epsilon <= found <= epsilon + 0.0105
    assert found < epsilon_spent(privacy, rounds)


@pytest.mark.parametrize(
    ("settings", "amplified"),
    [
        ([CENTRAL, *POISSON], True),
        ([LOCAL, *POISSON], False),  # the server knows the sample
        ([CENTRAL, "clients.fraction=0.25"], False),  # the seed determines the sample
        ([CENTRAL, "clients.sampling=poisson"], False),  # everybody takes part
    ],
)
def test_only_secret_poisson_samples_of_a_trusted_server_reduce_epsilon(settings, amplified):
    recipe = Recipe.load("smoke", ["baselines=[]", "strategy=fedavg", "privacy.noise=2", *settings])
    ledger = PrivacyLedger(recipe, 1, simulated=False)
    for number in range(1, 9):
        ledger.charge("fedavg", number)
    assert (ledger.epsilon < epsilon_spent(recipe.privacy, 8)) == amplified


def test_a_poisson_sample_draws_each_client_independently_and_across_sites_anew():
    recipe = Recipe.load("smoke", ["baselines=[]", *POISSON])
    drawn = [cohort(recipe, 40, number) for number in range(1, 101)]
    assert drawn == [cohort(recipe, 40, number) for number in range(1, 101)]
    sizes = [len(sample) for sample in drawn]
    assert sum(sizes) == pytest.approx(1000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5)
    assert len(set(sizes)) > 3
    assert len({tuple(cohort(recipe, 40, 1, secret=True)) for _ in range(5)}) > 1
    many = cohort(recipe, 100_000, 1, secret=True)
    assert many == sorted(set(many) & set(range(100_000)))
    rate = recipe.clients.fraction
    assert abs(len(many) - 100_000 * rate) < 6 * (100_000 * rate * (1 - rate)) ** 0.5


def test_a_round_without_clients_releases_noise_alone(formulas):
    found = formulas(3).federation(
        "strategy=fedavg",
        CENTRAL,
        "clients.sampling=poisson",
        "clients.fraction=1e-6",
        "rounds=2",
    )
    before = found.strategy.soup.rows.clone()
    records = list(found.rounds())
    assert [(record.clients, record.train_loss, record.bytes_up) for record in records] == [
        ([], None, 0)
    ] * 2
    moved = found.strategy.soup.rows - before
    deviation = 2**0.5 * found.recipe.privacy.clip / 3e-6  # z C / K in each round
    assert float(moved.std()) == pytest.approx(deviation, rel=6 / (2 * moved.numel()) ** 0.5)


def test_one_adapter_is_divided_by_the_mean_size_of_a_poisson_sample():
    rule = PrivateAggregator(
        PrivacyRecipe(mode="central", noise=1e-3, clip=1.0), cohort_size=2.5, seed=0
    )
    deltas = torch.full((5, 1), 1.0)
    assert float(rule.combine(deltas, torch.ones(5, 1), torch.ones(5))) == pytest.approx(
        2, rel=0.01
    )

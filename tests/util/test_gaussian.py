"""Gaussian noise from the operating system, and the exact privacy loss of Gaussian mechanisms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fedmerge_peft.util.gaussian_noise import add_noise, secret_normal
from fedmerge_peft.util.gaussian_privacy import delta_of, epsilon_of


@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_number_of_values_is_drawn(count):
    assert secret_normal(count).shape == (count,)


def test_secret_noise_is_standard_normal():
    drawn = secret_normal((1 << 20) + 5)
    # false once in 10⁹ runs
    assert kstest(drawn, "norm").pvalue > 1e-9
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.007
    assert abs(np.corrcoef(drawn[: 1 << 19], drawn[1 << 19 : 1 << 20])[0, 1]) < 0.01


def test_secret_noise_follows_from_no_seed():
    rows = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        rows.append(add_noise(torch.zeros(100), 1.0, None))
    assert not torch.equal(*rows)
    assert torch.equal(*(add_noise(torch.zeros(100), 1.0, 3) for _ in range(2)))


def test_secret_noise_has_the_deviation_and_the_dtype_of_its_values():
    values = torch.full((200, 500), 7.0)
    noisy = add_noise(values, 0.25, None)
    assert (noisy.shape, noisy.dtype) == (values.shape, values.dtype)
    assert float((noisy - 7).std()) == pytest.approx(0.25, rel=0.02)


# dp-accounting 0.6.0, PLDAccountant, GaussianDpEvent(z) composed T times; it overestimates slightly
@pytest.mark.parametrize(
    ("noise", "times", "delta", "epsilon"),
    [
        (1.0, 1, 1e-5, 4.377178),
        (1.0, 3, 1e-5, 8.385419),
        (1.0, 6, 1e-5, 12.870662),
        (60.0, 20, 1e-5, 0.247344),
    ],
)
def test_epsilon_equals_that_of_dp_accounting(noise, times, delta, epsilon):
    assert epsilon_of(times / noise**2, delta) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_delta_is_the_inverse_of_epsilon(mu, delta):
    epsilon = epsilon_of(mu * mu, delta)
    found = delta_of(epsilon, mu * mu)
    assert found <= delta * (1 + 1e-6)
    if epsilon > 0:
        assert found == pytest.approx(delta, rel=1e-5)


def test_no_release_costs_nothing_and_one_without_noise_everything():
    assert epsilon_of(0.0, 1e-5) == 0.0
    assert epsilon_of(math.inf, 1e-5) == math.inf
    assert epsilon_of(1e-12, 1e-5) == 0.0

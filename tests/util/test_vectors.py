"""Finiteness and norms of long vectors, also if sums or squares overflow."""

import pytest
import torch

from fedmerge_peft.util.vectors import all_finite, row_norms

pytestmark = pytest.mark.equality

LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 517, 999])
def test_one_nonfinite_number_is_detected(odd, place):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert all_finite(values)
    values[place] = odd
    assert not all_finite(values)
    assert not all_finite(values.view(10, 100))


def test_infinities_that_cancel_are_detected():
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))


def test_a_sum_that_overflows_is_accepted():
    values = torch.full((4,), LARGE)
    assert torch.isinf(values.sum())
    assert all_finite(values)
    assert not all_finite(torch.cat([values, torch.tensor([float("nan")])]))


def test_an_empty_vector_is_finite():
    assert all_finite(torch.empty(0))


@pytest.mark.parametrize("numbers", [0, 1, 1000, 1 << 10, 100_000, 3_000_001])
def test_norms_equal_those_of_double_precision(numbers):
    rows = torch.randn(2, numbers, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_norms(rows), rows.double().norm(dim=1), rtol=1e-6, atol=0)
    alike = torch.full((1, numbers), 0.1)
    torch.testing.assert_close(row_norms(alike), alike.double().norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e19, 1e25])
def test_norms_with_overflowing_squares_are_computed(size):
    rows = torch.stack([torch.full((20_000,), size), torch.ones(20_000)])
    torch.testing.assert_close(row_norms(rows), rows.double().norm(dim=1), rtol=1e-6, atol=0)

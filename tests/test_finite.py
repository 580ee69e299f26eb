"""Finite or not, whatever the sum does."""

import pytest
import torch

from fedmerge_peft.finite import finite

LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 517, 999])
def test_one_number_that_is_not_finite_is_found(odd, place):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert finite(values)
    values[place] = odd
    assert not finite(values)
    assert not finite(values.view(10, 100))


def test_infinities_that_cancel_are_found():
    assert not finite(torch.tensor([float("inf"), -float("inf")]))


def test_a_sum_that_overflows_is_no_fault():
    values = torch.full((4,), LARGE)
    assert torch.isinf(values.sum())
    assert finite(values)
    assert not finite(torch.cat([values, torch.tensor([float("nan")])]))


def test_nothing_is_finite():
    assert finite(torch.empty(0))

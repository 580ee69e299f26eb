"""State dictionaries of nested objects."""

import pytest
import torch

from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.util.stateful import Stateful


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, set()),
        ({"server_momentum": 0.9}, {"momentum_buffer"}),
        ({"server_optimizer": "adam"}, {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_the_server_optimizer_restores_its_moments_and_refuses_others(settings, names):
    from fedmerge_peft.recipe.strategies import FedAvgRecipe

    def make(columns):
        return ServerOptimizer(FedAvgRecipe(name="fedavg", **settings), torch.zeros(2, columns))

    first, second = make(3), make(3)
    rows = first.step(torch.zeros(2, 3), torch.ones(2, 3))
    assert first.state_dict().keys() == names
    second.load_state_dict(first.state_dict())
    gradient = torch.arange(6.0).view(2, 3)
    assert torch.equal(first.step(rows, gradient), second.step(rows, gradient))
    if names:
        with pytest.raises(ValueError, match=r"expected a float32 tensor \(2, 4\), got"):
            make(4).load_state_dict(first.state_dict())


class Part(Stateful):
    state_fields = ("numbers", "_count", "inner")

    def __init__(self, inner):
        self.numbers, self._count, self.inner = torch.zeros(2), 0, inner


def test_a_part_that_is_none_is_restored_as_none():
    one, two = Part(Part(None)), Part(Part(None))
    one.inner, one._count = None, 3
    assert one.state_dict().keys() == {"numbers", "count", "inner"}
    two.load_state_dict(one.state_dict())
    assert (two.inner, two._count) == (None, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": torch.zeros(3)},
        {"numbers": torch.zeros(2, dtype=torch.float64)},
        {"numbers": None},
        {"numbers": 1},
        {"count": None},
        {"count": True},
        {"count": torch.zeros(2)},
        {"other": 1},
        {"inner": 1},
        {"inner.other": 1},
    ],
)
def test_the_state_of_another_object_is_refused(change):
    part = Part(Part(None))
    with pytest.raises(ValueError, match=r"expected|only in the saved state"):
        part.load_state_dict({**part.state_dict(), **change})

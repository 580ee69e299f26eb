"""The digest of examples follows what is given, and not how a machine rounds what is computed."""

import numpy as np
import pytest
import torch

from fedmerge_peft.data import Client
from fedmerge_peft.engines.examples_digest import examples_digest
from fedmerge_peft.tasks import Examples

CLIENTS = [Client("a", np.array([0]), np.array([1]), np.array([2]))]


def digest_with(name, value):
    columns = {
        "input_ids": [torch.tensor([1, 2])] * 3,
        "input_values": [torch.tensor([0.5, 1.5])] * 3,
        "labels": [torch.tensor(0.5)] * 3,
    }
    changed = [*columns[name][:2], torch.tensor(value)]
    return examples_digest(CLIENTS, Examples({**columns, name: changed}))


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("input_ids", [1, 2], [1, 3]),
        ("input_values", [0.5, 1.5000001], [0.5, 1.5, 0.0]),
        ("labels", 0.5, 0.5000001),
    ],
)
def test_computed_numbers_may_differ_by_rounding(name, same, other):
    unchanged = digest_with("labels", 0.5)
    assert digest_with(name, same) == unchanged != digest_with(name, other)

"""Digests of values, dtypes and shapes."""

import pytest
import torch

from fedmerge_peft.util.digest import digest


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_digests_follow_from_values_and_not_from_strides(dtype):
    expanded = torch.ones(1, dtype=dtype).expand(3)
    parts = [expanded[:1], torch.ones(1, dtype=dtype).as_strided((1,), (0,)), expanded[:0]]
    assert digest(parts[:1]) == digest([torch.ones(1, dtype=dtype)]) == digest(parts[1:2])
    assert digest(parts[2:]) == digest([torch.empty(0, dtype=dtype)])
    assert digest(parts[:1]) != digest([torch.ones(2, dtype=dtype)])

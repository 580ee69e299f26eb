"""Tolerances between two computations of the same result, by number format."""

import torch


def tolerance(dtype):
    """Half of the format's digits, √ε: 1.5e-8 in float64, 3.5e-4 in float32, 0.09 in bfloat16.

    Another processor adds the same numbers in another order. The other half of the digits is room
    for that.
    """
    return torch.finfo(dtype).eps ** 0.5


def assert_near(found, expected, start=0.0):
    """‖found − expected‖ ≤ √ε ‖expected − start‖, with ε of the coarser format.

    Args:
        found: A tensor.
        expected: A tensor of the same shape.
        start: A common starting point: with it, the difference is measured by how far both moved.
    """
    assert found.shape == expected.shape
    coarser = max(found.dtype, expected.dtype, key=tolerance)
    error, size = (float(each.double().norm()) for each in (found - expected, expected - start))
    assert error <= tolerance(coarser) * size, f"{error:.2g} of {size:.2g} in {coarser}"

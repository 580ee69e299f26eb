"""Whether numbers are finite, at the speed of memory."""

import torch
from torch import Tensor


def finite(values: Tensor) -> bool:
    """Whether all of them are. One that is not makes their sum not finite either; only where the sum itself overflows is each looked at."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())

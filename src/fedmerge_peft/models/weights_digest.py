"""Digest of a pretrained model's weights, to notice that they have changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from fedmerge_peft.util.digest import digest

_SAMPLE = 256
"""Least number of values of each tensor in the digest. They have equal distances. Training changes
nearly all values of a tensor, so a sample is enough, and takes milliseconds for large models."""


def weights_digest(model: nn.Module, missing: Collection[str]) -> str:
    """Return a hexadecimal digest of a sample of the weights, and of all names and shapes.

    Quantized weights are left out, because their rounding depends on the device.

    Args:
        model: Model as loaded, without an adapter.
        missing: Names of tensors and modules that are not pretrained; they are left out.
    """
    return digest(_parts(model, missing)).hex()


def _parts(model: nn.Module, missing: Collection[str]) -> Iterator[Tensor | str]:
    for path, module in model.named_modules():
        # Buffers that are not saved are computed, and their rounding depends on the machine.
        computed = module._non_persistent_buffers_set
        buffers = [part for part in module.named_buffers(recurse=False) if part[0] not in computed]
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            full = f"{path}.{name}".removeprefix(".")
            if not {full, *path.split(".")}.intersection(missing) and tensor.is_floating_point():
                yield f"{full} {tuple(tensor.shape)}"
                yield tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLE)]

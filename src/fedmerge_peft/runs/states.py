"""Read the soup and the weights of a run directory, and check that their shapes agree."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fedmerge_peft.adapters.merging_weights import read_weights
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.util.checked import damaged


def read_client_weights(path: Path, clients: int) -> Tensor:
    """Read π ``(clients, adapters)`` from a file.

    Raises:
        RunError: The file is missing or damaged, or its number of clients is not ``clients``.
    """
    weights = read_weights(path)
    if len(weights) != clients:
        raise damaged(path, f"it has weights of {len(weights)} clients, expected {clients}")
    return weights


def read_state(folder: Path, clients: int) -> tuple[AdapterSoup, Tensor]:
    """Read the soup and π ``(clients, adapters)`` from a folder.

    Raises:
        RunError: A file is missing or damaged, the two files have different numbers of adapters, or
            a number of clients is not ``clients``.
    """
    weights = read_client_weights(folder / "weights.safetensors", clients)
    path = folder / "soup.safetensors"
    soup = AdapterSoup.load(path)
    if len(soup) != weights.shape[1]:
        raise damaged(path, f"it has {len(soup)} adapters, expected {weights.shape[1]}")
    if soup.own is not None and len(soup.own.residuals) != clients:
        raise damaged(
            path, f"it has own parts of {len(soup.own.residuals)} clients, expected {clients}"
        )
    if soup.blocks is not None and len(soup.blocks.offsets) != clients:
        raise damaged(
            path, f"it has weights of {len(soup.blocks.offsets)} clients, expected {clients}"
        )
    return soup, weights

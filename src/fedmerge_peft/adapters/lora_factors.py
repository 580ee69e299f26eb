"""LoRA factors A and B: their names, columns in a row, and computations with B A.

The computations, an inner product and a singular value decomposition, avoid the product B A itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout, Entry

_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""Suffixes of the saved names of A ``(r, in)`` and B ``(out, r)``, for layers and embeddings."""
_SUFFIXES = tuple(name for pair in _FACTORS for name in pair)

A_SUFFIXES = tuple(a for a, _ in _FACTORS)
"""Suffixes of the saved names of A."""

B_SUFFIXES = tuple(b for _, b in _FACTORS)
"""Suffixes of the saved names of B."""

RANDOM_INIT_SUFFIXES = ("lora_A.weight", "lora_embedding_B")
"""Suffixes of the factors that PEFT initializes at random. The other factor starts at zero."""


def factor_pairs(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (layer name in the PEFT model, saved name of A, saved name of B) for each A."""
    for name in names:
        for a, b in _FACTORS:
            if name.endswith("." + a):
                module = name.removesuffix("." + a)
                yield module, name, f"{module}.{b}"


def check_plain_lora(layout: AdapterLayout) -> None:
    """Check that each layer's update is scaling · B A with two matrices A and B.

    Raises:
        ValueError: The adapter uses DoRA, or adapts experts or convolutions.
    """
    for entry in layout.entries:
        if entry.role == "expert":
            raise ValueError(
                f"{entry.key} stacks several experts in one tensor (lora.target_parameters)"
            )
        if "lora_magnitude_vector" in entry.key:
            raise ValueError(
                "DoRA's magnitudes make the change of a weight nonlinear in B A (lora.use_dora)"
            )
        if entry.key.endswith(_SUFFIXES) and len(entry.shape) != 2:
            raise ValueError(f"{entry.key} is the factor of a convolution")


@dataclass(frozen=True)
class LayerFactors:
    """Factors of an adapted layer, whose update is scaling · B A."""

    module: str
    """Name of the layer in the PEFT model: A's saved name without its suffix (``factor_pairs``)."""
    a: Entry
    """Entry of A, ``(r, in)``."""
    b: Entry
    """Entry of B, ``(out, r)``."""

    @property
    def rank(self) -> int:
        """Rank r of the layer."""
        return self.a.shape[0]

    @property
    def embedding(self) -> bool:
        """True if the layer is an embedding."""
        return self.a.key.endswith(_FACTORS[1][0])

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of A ``(r, in)`` and B ``(out, r)`` in a row ``(P,)``."""
        return row[self.a.columns].view(self.a.shape), row[self.b.columns].view(self.b.shape)


def layer_factors(layout: AdapterLayout) -> list[LayerFactors]:
    """Return the factors of all adapted layers.

    Raises:
        ValueError: The adapter is not plain LoRA (``check_plain_lora``), or one factor of a pair is
            frozen and shared, and therefore not in the row.
    """
    check_plain_lora(layout)
    entries = {entry.key: entry for entry in layout.entries}
    pairs = [
        LayerFactors(module, entries[a], entries[b])
        for module, a, b in factor_pairs(entries)
        if b in entries
    ]
    paired = {entry.key for layer in pairs for entry in (layer.a, layer.b)}
    for key in entries:
        if key.endswith(_SUFFIXES) and key not in paired:
            raise ValueError(
                f"the other factor of {key} is frozen and shared by all adapters "
                "(lora.merge: shared_a)"
            )
    return pairs


def rank_mask(layout: AdapterLayout, ranks: Callable[[int], slice]) -> Tensor:
    """Return a bool mask ``(P,)`` of some ranks of each layer (rows of A, columns of B).

    Args:
        layout: Layout of the row.
        ranks: Function from a layer's rank to the slice of ranks to select.

    Raises:
        ValueError: See ``layer_factors``.
    """
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for layer in layer_factors(layout):
        a, b = layer.split(mask)
        a[ranks(layer.rank)] = True
        b[:, ranks(layer.rank)] = True
    return mask


def suffix_mask(layout: AdapterLayout, suffixes: tuple[str, ...]) -> Tensor:
    """Return a bool mask ``(P,)`` of the tensors whose saved name has one of these suffixes."""
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        if entry.key.endswith(suffixes):
            mask[entry.columns] = True
    return mask


def update_inner_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Compute ⟨B A, B' A'⟩_F of pairs (A, B) and (A', B') in float64; the ranks may differ.

    The identity ⟨B A, B' A'⟩_F = ⟨Bᵀ B', A A'ᵀ⟩_F avoids both products.
    """
    (a, b), (other_a, other_b) = one, other
    return float(((b.double().T @ other_b.double()) * (a.double() @ other_a.double().T)).sum())


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the singular value decomposition of B A in float64.

    With B = Q_B R_B and Aᵀ = Q_A R_A, only the small matrix R_B R_Aᵀ has to be decomposed.

    Args:
        b: ``(out, r)``.
        a: ``(r, in)``.

    Returns:
        U ``(out, k)``, S ``(k,)`` in descending order, and Vᵀ ``(k, in)``, with k ≤ r.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T

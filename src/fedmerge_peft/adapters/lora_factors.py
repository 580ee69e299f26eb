"""LoRA's factors: what they are called, which columns of a row their ranks are, and products B A brought to a lower rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout, Entry

_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""How the saved names of the factors A ``(r, in)`` and B ``(out, r)`` end: of layers, and of embeddings."""
_NAMES = tuple(name for pair in _FACTORS for name in pair)

A_SUFFIXES = tuple(a for a, _ in _FACTORS)
"""How the saved names of A end."""

RANDOM_INIT_SUFFIXES = ("lora_A.weight", "lora_embedding_B")
"""How the saved names of the factors end that PEFT starts at random numbers; their partners start at zero."""


def factor_pairs(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """For each factor A among the saved names: the layer's name in the PEFT model, and the saved names of A and B."""
    for name in names:
        for a, b in _FACTORS:
            if name.endswith("." + a):
                module = name.removesuffix("." + a)
                yield module, name, f"{module}.{b}"


def check_plain_lora(layout: AdapterLayout) -> None:
    """Raise ``ValueError`` unless each layer's update is scaling · B A of two matrices: not with DoRA, on experts, or on convolutions."""
    for entry in layout.entries:
        if entry.role == "expert":
            raise ValueError(
                f"{entry.key} holds several experts in one tensor (lora.target_parameters)"
            )
        if "lora_magnitude_vector" in entry.key:
            raise ValueError("the magnitudes of DoRA do not enter linearly (lora.use_dora)")
        if entry.key.endswith(_NAMES) and len(entry.shape) != 2:
            raise ValueError(f"{entry.key} is the factor of a convolution")


@dataclass(frozen=True)
class LayerFactors:
    """The two factors of one adapted layer, whose update is scaling · B A."""

    module: str
    """Name of the layer in the PEFT model: the saved names without ``.lora_A.weight``."""
    a: Entry
    """A, ``(r, in)``."""
    b: Entry
    """B, ``(out, r)``."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def embedding(self) -> bool:
        return self.a.key.endswith(_FACTORS[1][0])

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A ``(r, in)`` and B ``(out, r)`` in a row ``(P,)``."""
        return row[self.a.columns].view(self.a.shape), row[self.b.columns].view(self.b.shape)


def layer_factors(layout: AdapterLayout) -> list[LayerFactors]:
    """The pairs A, B of all adapted layers.

    Raises:
        ValueError: As ``check_plain_lora``, and for factors whose partner is not in the row but frozen and common.
    """
    check_plain_lora(layout)
    entries = {entry.key: entry for entry in layout.entries}
    found = [
        LayerFactors(module, entries[a], entries[b])
        for module, a, b in factor_pairs(entries)
        if b in entries
    ]
    paired = {entry.key for layer in found for entry in (layer.a, layer.b)}
    for key in entries:
        if key.endswith(_NAMES) and key not in paired:
            raise ValueError(
                f"the partner of {key} is frozen and common to all adapters (lora.merge: shared_a)"
            )
    return found


def rank_mask(layout: AdapterLayout, ranks: Callable[[int], slice]) -> Tensor:
    """The columns of some of each layer's ranks, as a mask ``(P,)``: rows of A, columns of B.

    ``ranks`` is told the rank of a layer and says which of it are meant. Raises ``ValueError`` as ``layer_factors`` does.
    """
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for layer in layer_factors(layout):
        a, b = layer.split(mask)
        a[ranks(layer.rank)] = True
        b[:, ranks(layer.rank)] = True
    return mask


def suffix_mask(layout: AdapterLayout, endings: tuple[str, ...]) -> Tensor:
    """The columns of tensors whose saved name ends so, as a mask ``(P,)``."""
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for entry in layout.entries:
        if entry.key.endswith(endings):
            mask[entry.columns] = True
    return mask


def update_inner_product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """⟨B A, B' A'⟩_F of two pairs (A, B) and (A', B') of any ranks, in float64, without either product: ⟨Bᵀ B', A A'ᵀ⟩."""
    (a, b), (other_a, other_b) = one, other
    return float(((b.double().T @ other_b.double()) * (a.double() @ other_a.double().T)).sum())


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(out, k)``, S ``(k,)`` and Vᵀ ``(k, in)`` of B A in float64, largest first, for B ``(out, r)`` and A ``(r, in)``.

    With B = Q_B R_B and Aᵀ = Q_A R_A it is the singular value decomposition of the small R_B R_Aᵀ, and k is at most r.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T

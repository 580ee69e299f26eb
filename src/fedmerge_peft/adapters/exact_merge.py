"""Exact averages of LoRA updates, as opposed to the paper's average of parameters.

The paper (arXiv 2504.06768) averages parameters: A = Σ_j π_j A_j and B = Σ_j π_j B_j. The merged
update (Σ_j π_j B_j)(Σ_j π_j A_j) contains cross terms B_j A_k. The average of the updates,
Σ_j π_j B_j A_j, has no cross terms and has rank up to d·r. This module computes the average of the
updates, and the distance between both averages. It also adds updates of the backbone to an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import check_plain_lora, factor_pairs
from fedmerge_peft.adapters.soup import AdapterSoup

_AVERAGE = "; use exact=False or AdapterSoup.merge, which average A and B separately"
"""Remedy if adapters that are to be merged have no exact merge."""


def _check_exact(soup: AdapterSoup, remedy: str = "") -> None:
    try:
        check_plain_lora(soup.layout)
    except ValueError as error:
        raise ValueError(f"these adapters have no exact merge: {error}{remedy}") from error


def _factors_with_own_parts(soup: AdapterSoup) -> set[str]:
    """Return the names, ``A`` and ``B``, of the factors in which clients have own parts."""
    if soup.own is None:
        return set()
    own = torch.zeros(soup.layout.size, dtype=torch.bool)
    own[soup.own.columns] = True
    columns = {entry.key: own[entry.columns] for entry in soup.layout.entries}
    pairs = [pair[1:] for pair in factor_pairs(columns)]
    return {
        name
        for pair in pairs
        for name, key in zip("AB", pair, strict=True)
        if key in columns and bool(columns[key].any())
    }


def concat(
    soup: AdapterSoup, weights: Tensor, config: Mapping[str, Any], clients: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compute Σ_j π_j B_j A_j exactly, as one adapter with the factors concatenated along the rank.

    Args:
        soup: d adapters of rank r.
        weights: One row of π, ``(d,)``.
        config: PEFT configuration of the soup's adapters (``adapter_config.json`` as a mapping).
        clients: Share of each client in the adapter, ``(m,)``, as in ``AdapterSoup.merge``.

    Own parts in the head are averaged exactly. If the clients have B of their own and share one A,
    as with ``fedsa_lora``, the average of B is exact too.

    Returns:
        State dict of the adapter in PEFT's saved form, and its configuration. The rank is r times
        the number of adapters with a nonzero weight (in any block), or r with own B. The scaling is
        unchanged.

    Raises:
        ValueError: The adapters use DoRA, or adapt convolutions or experts; own parts are private,
            and ``clients`` is None or does not sum to 1; or clients have own parts in both A and B,
            or in one of them while several adapters have a nonzero weight.
    """
    _check_exact(soup, _AVERAGE)
    by_block, of = weights.expand(1, -1), None
    if soup.blocks is not None and clients is not None:
        by_block, of = weights + soup.blocks.mixed(clients), soup.blocks.blocks.of
    used = (by_block != 0).any(dim=0)
    states = [soup.state_dict(row) for row in soup.rows[used]]
    # Heads and biases are not products of factors, so the average of their parameters is exact.
    merged = soup.state_dict(soup.merge(weights, clients))
    if clients is not None and (own := _factors_with_own_parts(soup)):
        if len(own) > 1 or len(states) > 1:
            raise ValueError(
                "these adapters have no exact merge: clients have own parts in their LoRA factors"
                + _AVERAGE
            )
        return merged, dict(config)
    first = {entry.key: entry.offset for entry in soup.layout.entries}
    for _, a_key, b_key in factor_pairs(states[0]):
        block = 0 if of is None else int(of[first[b_key]])
        merged[a_key] = torch.cat([state[a_key] for state in states], dim=0)
        merged[b_key] = torch.cat(
            [
                float(weight) * state[b_key]
                for weight, state in zip(by_block[block, used], states, strict=True)
            ],
            dim=1,
        )
    adapters = len(states)
    # The scaling is alpha / r, or alpha / sqrt(r) with rsLoRA. Alpha grows with the rank so that
    # the scaling stays constant.
    growth = math.sqrt(adapters) if config.get("use_rslora") else adapters
    return merged, {
        **config,
        "r": config["r"] * adapters,
        "lora_alpha": config["lora_alpha"] * growth,
        "rank_pattern": {
            key: rank * adapters for key, rank in (config.get("rank_pattern") or {}).items()
        },
        "alpha_pattern": {
            key: alpha * growth for key, alpha in (config.get("alpha_pattern") or {}).items()
        },
    }


def add_base_update(
    state: Mapping[str, Tensor], config: Mapping[str, Any], base: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Add updates ΔW of the backbone to an adapter, so that it fits the pretrained backbone.

    scaling · [B, U S / scaling] [A; Vᵀ] = scaling · B A + ΔW, where U S Vᵀ is the singular value
    decomposition of ΔW without singular values below the rounding error of float32.

    Args:
        state: State dict of an adapter on linear layers, in PEFT's saved form.
        config: PEFT configuration of the adapter.
        base: ΔW ``(out, in)`` by module name (``AdapterSoup.base``).

    Returns:
        State dict and configuration of the new adapter. The rank of each layer grows by the rank of
        its ΔW.

    Raises:
        ValueError: A layer has a ΔW, but the adapter does not adapt this layer.
    """
    from peft.utils.other import get_pattern_key

    power = 0.5 if config.get("use_rslora") else 1.0
    alphas = config.get("alpha_pattern") or {}
    extended, rank_pattern, alpha_pattern, unmatched = dict(state), {}, {}, set(base)
    for module, a_key, b_key in factor_pairs(state):
        name = module.removeprefix("base_model.model.")
        a, b = state[a_key], state[b_key]
        scaling = (
            alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]) / len(a) ** power
        )
        if module in base:
            unmatched.remove(module)
            u, s, vh = torch.linalg.svd(base[module].double(), full_matrices=False)
            rank = int(
                (
                    s > s[0] * torch.finfo(torch.float32).eps * math.sqrt(max(base[module].shape))
                ).sum()
            )
            b = torch.cat([b, (u[:, :rank] * s[:rank] / scaling).to(b)], dim=1)
            a = torch.cat([a, vh[:rank].to(a)])
        extended[a_key], extended[b_key] = a, b
        rank_pattern[f"^{name}"], alpha_pattern[f"^{name}"] = len(a), scaling * len(a) ** power
    if unmatched:
        raise ValueError(
            f"the update of the backbone's layer {sorted(unmatched)[0]} cannot be added to an "
            "adapter that does not adapt this layer; remove the update, or adapt the layer"
        )
    return extended, {**config, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def merge_error(soup: AdapterSoup, weights: Tensor) -> float:
    """Compute the relative distance of the parameter average from the average of updates.

    The distance is ‖(Σ π_j B_j)(Σ π_j A_j) − Σ π_j B_j A_j‖_F / ‖Σ π_j B_j A_j‖_F over all adapted
    modules. It is 0 with ``merge: shared_a``, with one adapter, and with one-hot weights. It is
    also 0 if the adapter has no factors or the average of the updates is zero. Weights by block and
    own parts of the clients are ignored.

    Args:
        soup: d adapters.
        weights: One row of π, ``(d,)``.

    Raises:
        ValueError: The adapters use DoRA, adapt convolutions or experts, or have private parts.
    """
    _check_exact(soup)
    states = [soup.state_dict(row) for row in soup.rows]
    merged = soup.state_dict(soup.merge(weights))
    off = exact = 0.0
    for _, a_key, b_key in factor_pairs(merged):
        terms = (
            weight * (state[b_key].double() @ state[a_key].double())
            for weight, state in zip(weights.double(), states, strict=True)
        )
        update = sum(terms, start=torch.zeros((), dtype=torch.float64))
        off += float((merged[b_key].double() @ merged[a_key].double() - update).square().sum())
        exact += float(update.square().sum())
    return math.sqrt(off / exact) if exact > 0 else 0.0

"""Averaging LoRA in the space of functions, beside the paper's average of parameters.

The paper averages parameters: A = Σ_j π_j A_j and B = Σ_j π_j B_j, so the merged update is
(Σ_j π_j B_j)(Σ_j π_j A_j). That has cross terms B_j A_k; the average of the updates themselves,
Σ_j π_j B_j A_j, has none. The second needs rank d·r; these functions give it, and the distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import check_plain_lora, factor_pairs
from fedmerge_peft.adapters.soup import AdapterSoup


def _check_exact(soup: AdapterSoup) -> None:
    try:
        check_plain_lora(soup.layout)
    except ValueError as error:
        raise ValueError(f"these adapters have no exact merge: {error}") from error


def concat(
    soup: AdapterSoup, weights: Tensor, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One adapter that computes Σ_j π_j B_j A_j exactly, by concatenating the factors along the rank.

    Args:
        soup: d adapters of rank r.
        weights: One row of π, ``(d,)``.
        config: PEFT's adapter configuration of the soup (``adapter_config.json`` as a mapping).

    Returns:
        PEFT's saved form of an adapter of rank r times the number of weights that are not 0, and its configuration with the scaling
        unchanged.

    Raises:
        ValueError: The adapters are DoRA, or on convolutions.
    """
    _check_exact(soup)
    used = weights != 0
    states = [soup.state_dict(row) for row in soup.rows[used]]
    merged = soup.state_dict(
        soup.merge(weights)
    )  # heads and biases are linear: their average is exact
    for _, a_key, b_key in factor_pairs(states[0]):
        merged[a_key] = torch.cat([state[a_key] for state in states], dim=0)
        merged[b_key] = torch.cat(
            [
                float(weight) * state[b_key]
                for weight, state in zip(weights[used], states, strict=True)
            ],
            dim=1,
        )
    adapters = len(states)
    # The scaling is alpha / r, or alpha / sqrt(r) with rsLoRA; the rank grows so many times, so alpha must follow.
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
    """One adapter that carries what the backbone has gained too: scaling · [B, U S / scaling] [A; Vᵀ] = scaling · B A + ΔW.

    U S Vᵀ is ΔW, without what is below the rounding error of its float32 numbers.

    Args:
        state: PEFT's saved form of an adapter on linear layers.
        config: PEFT's configuration of it.
        base: ΔW ``(out, in)`` by module name (``AdapterSoup.base``).

    Returns:
        The same of an adapter that runs on the pretrained backbone; each layer's rank has grown by the rank of its ΔW.

    Raises:
        ValueError: A ΔW belongs to a layer that the adapter is not on.
    """
    from peft.utils.other import get_pattern_key

    power = 0.5 if config.get("use_rslora") else 1.0
    alphas = config.get("alpha_pattern") or {}
    whole, ranks, scaled, left = dict(state), {}, {}, set(base)
    for module, a_key, b_key in factor_pairs(state):
        name = module.removeprefix("base_model.model.")
        a, b = state[a_key], state[b_key]
        scaling = (
            alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]) / len(a) ** power
        )
        if module in base:
            left.remove(module)
            u, s, vh = torch.linalg.svd(base[module].double(), full_matrices=False)
            rank = int(
                (
                    s > s[0] * torch.finfo(torch.float32).eps * math.sqrt(max(base[module].shape))
                ).sum()
            )
            b = torch.cat([b, (u[:, :rank] * s[:rank] / scaling).to(b)], dim=1)
            a = torch.cat([a, vh[:rank].to(a)])
        whole[a_key], whole[b_key] = a, b
        ranks[f"^{name}"], scaled[f"^{name}"] = len(a), scaling * len(a) ** power
    if left:
        raise ValueError(
            f"the adapter is not on {sorted(left)[0]}, to which the backbone's change belongs"
        )
    return whole, {**config, "rank_pattern": ranks, "alpha_pattern": scaled}


def merge_error(soup: AdapterSoup, weights: Tensor) -> float:
    """How far the parameter average is from the average of updates, relative to the latter.

    ‖(Σ π_j B_j)(Σ π_j A_j) − Σ π_j B_j A_j‖_F / ‖Σ π_j B_j A_j‖_F over all adapted modules, for one row of
    π ``(d,)``. Zero with ``merge: shared_a``, with one adapter, and with one-hot weights. Raises ``ValueError`` as
    ``concat`` does; 0 where there are no factors or all updates are zero.
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

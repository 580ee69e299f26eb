"""LoRA factors of formula clients, and the exact mean of their products."""

import torch

LAYERS = ("one", "two")


def pair(layout, row, layer):
    state = layout.state_dict(row)
    return state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]


def mean_product(case, rows, layer, ranks=None):
    """Σ_i ρ_i B_i A_i over the first r_i ranks, densely."""
    total = 0.0
    for client, (share, row) in enumerate(zip(case.shares, rows, strict=True)):
        a, b = pair(case.layout, row, layer)
        rank = ranks[client] if ranks else len(a)
        total = total + share * b[:, :rank] @ a[:rank]
    return total


def outputs(backbone, tokens):
    with torch.no_grad():
        return backbone.model(input_ids=tokens).logits

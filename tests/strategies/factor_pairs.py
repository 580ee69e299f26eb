"""LoRA factors of formula clients, their columns, and the exact mean of their products."""

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


def columns(layout, *names):
    """Columns of the tensors whose names contain one of these words."""
    return torch.cat(
        [
            torch.arange(layout.size)[entry.columns]
            for entry in layout.entries
            if any(name in entry.key for name in names)
        ]
    )


def halves(layout):
    """The global and the private half of the columns, entry by entry."""
    shared, private = (
        torch.zeros(layout.size, dtype=torch.bool),
        torch.zeros(layout.size, dtype=torch.bool),
    )
    for entry in layout.entries:
        for number in range(entry.size):
            row, column = divmod(number, entry.shape[1])
            if "lora" in entry.key:
                rank = row if "lora_A" in entry.key else column
                (shared if rank < 2 else private)[entry.offset + number] = True
    return shared, private

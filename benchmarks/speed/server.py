"""Row d: FedMerge's server step for 1000 replies of 1 000 000 numbers, and 8 adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import shares
import torch
from timing import Row, faster, race
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.recipe.strategies import FedMergeRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy

ADAPTERS = 8


def rows(
    clients: int = 1000, tensors: int = 100, width: int = 10_000, looped: int = 25
) -> Iterator[Row]:
    """d. The server step: 1000 clients, 8 adapters of 10^6 numbers in 100 tensors, default rule.

    Args:
        clients: Number of replies, a multiple of 50.
        tensors: Tensors of an adapter.
        width: Numbers of a tensor, a multiple of 8.
        looped: Clients for which the loop over tensors is timed; its time is linear in them.
    """
    layout = AdapterLayout.from_tensors(
        [(f"layer{number}.lora_A.weight", (8, width // 8), "lora") for number in range(tensors)]
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(ADAPTERS, layout.size, generator=generator)
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=ADAPTERS, start="independent", weights_lr=1.0),
        StrategyContext(clients, layout, drawn.__getitem__),
    )
    block = 0.01 * torch.randn(50, layout.size, generator=generator)
    deltas = torch.cat([block] * (clients // 50))
    replies = [
        Reply(client, deltas[client : client + 1], 10, 1.0, 0.0) for client in range(clients)
    ]
    soup, weighting = strategy.soup.rows.clone(), torch.rand(ADAPTERS, clients)
    copied = torch.empty_like(deltas[: clients // 10])
    states = [layout.state_dict(row) for row in soup]
    some = [layout.state_dict(deltas[client]) for client in range(looped)]
    weights = torch.full((looped, ADAPTERS), 1 / ADAPTERS)

    def products() -> None:
        _ = deltas @ soup.T
        _ = weighting @ deltas

    def copy() -> None:
        for part in deltas.split(len(copied)):
            copied.copy_(part)

    sides = {
        "step": lambda: strategy.update(replies),
        "two products": products,
        "copy": copy,
        f"loops ({looped} clients)": lambda: by_tensor(states, weights, some),
    }
    taken = race(sides, 3)
    loops = taken.pop(f"loops ({looped} clients)")
    taken[f"loops ({looped} clients, times {clients // looped})"] = [
        clients / looped * each for each in loops
    ]
    yield faster(
        "d. the server step over loops through state dicts", taken, "step", list(taken)[-1], "≥ 20"
    )
    yield faster(
        "d. the server step over the two products alone", taken, "step", "two products", "≥ 0.83"
    )
    yield faster("d. the server step over a copy of the deltas' bytes", taken, "step", "copy")
    yield shares.row(
        "d. operations of the server step, processor time",
        [shares.by_operation(sides["step"])],
    )


def by_tensor(
    soup: list[Mapping[str, Tensor]], weights: Tensor, deltas: list[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Compute the same step tensor by tensor: merge, inner products, new weights, weighted sums."""
    moved = []
    for client, delta in enumerate(deltas):
        merged = {
            name: sum(float(weights[client, j]) * soup[j][name] for j in range(len(soup)))
            for name in delta
        }
        products = [
            sum(float(((state[name] - merged[name]) * delta[name]).sum()) for name in delta)
            for state in soup
        ]
        gradient = weights[client] * torch.tensor(products)
        moved.append(torch.softmax(weights[client].log() - gradient / gradient.abs().max(), dim=0))
    totals = torch.stack(moved).sum(dim=0)
    found = []
    for j, state in enumerate(soup):
        new = {name: tensor.clone() for name, tensor in state.items()}
        for client, delta in enumerate(deltas):
            for name in new:
                new[name] -= float(moved[client][j] / totals[j]) * delta[name]
        found.append(new)
    return found

"""FlexLoRA: the mean of the clients' updates B A, truncated to each client's rank.

Source: Bai et al. 2024, arXiv 2402.11505.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import LayerFactors, product_svd, update_inner_product
from fedmerge_peft.strategies.base import Reply, stack_replies
from fedmerge_peft.strategies.heterogeneous_ranks import HeterogeneousRanks


class FlexLora(HeterogeneousRanks):
    """Mean of the clients' updates, factored by a singular value decomposition in each layer:

        Σ_i ρ_i B_i A_i = U S Vᵀ,    B ← U_r S_r,    A ← V_rᵀ

    ρ_i is n_i / n over the clients that replied. B A is the best approximation of the mean at rank
    r, and exact if the rank of the mean is at most r. A client of rank r_i is sent the first r_i
    directions. The scaling is common to all clients and therefore not part of the sum. B takes all
    of S. The rows of A are orthonormal, close in size to LoRA's initial values, so a direction with
    S = 0 can still be learned. Heads and all other parameters that are not factors are averaged.
    """

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack_replies(replies)
        shares = sizes / sizes.sum()
        trained = self.soup.rows[self.assigned[clients]] - deltas
        row = torch.where(self.plain, shares.to(trained) @ trained, self.soup.rows[-1])
        for layer in self.factors:
            factors = [layer.split(client_row) for client_row in trained]
            ranks = [min(self.ranks[int(client)], layer.rank) for client in clients]
            stacked_b = torch.cat(
                [
                    share * b[:, :rank].double()
                    for share, (_, b), rank in zip(shares, factors, ranks, strict=True)
                ],
                dim=1,
            )
            stacked_a = torch.cat([a[:rank] for (a, _), rank in zip(factors, ranks, strict=True)])
            u, s, vh = product_svd(stacked_b, stacked_a)
            a, b = layer.split(row)
            rank = min(layer.rank, len(s))
            a[:rank] = vh[:rank].to(a)
            b.zero_()
            b[:, :rank] = (u[:, :rank] * s[:rank]).to(b)
        self.soup = self._soup(row)

    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        pair = layer.split(self.soup.rows[self.assigned[client]])
        return pair, update_inner_product(pair, pair)

    def traffic(self, client: int) -> tuple[int, int]:
        return self.adapter_size(client), self.adapter_size(client)

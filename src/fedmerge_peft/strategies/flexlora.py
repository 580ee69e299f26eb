"""FlexLoRA: the mean of the clients' updates, brought back to each client's rank (Bai et al. 2024, arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import LayerFactors, product_svd, update_inner_product
from fedmerge_peft.strategies.base import Reply, stack
from fedmerge_peft.strategies.heterogeneous_ranks import Ranked


class FlexLora(Ranked):
    """For each adapted layer, with ρ_i = n_i / n over the clients that replied:

        Σ_i ρ_i B_i A_i = U S Vᵀ,    B ← U_r S_r,    A ← V_rᵀ

    the best approximation at rank r, and exact where the mean has no higher rank. A client of rank r_i is sent the first r_i directions.
    The scaling is common to all clients, so it stays out of the sum. S goes to B whole: A keeps orthonormal rows, of about the size at
    which LoRA starts, and a direction with S = 0 can be learned again. Heads, and what else does not belong to the factors, are averaged.
    """

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack(replies)
        shares = sizes / sizes.sum()
        trained = self.soup.rows[self.assigned[clients]] - deltas
        row = torch.where(self.plain, shares.to(trained) @ trained, self.soup.rows[-1])
        for layer in self.factors:
            each = [layer.split(one) for one in trained]
            held = [min(self.ranks[int(client)], layer.rank) for client in clients]
            stacked_b = torch.cat(
                [
                    share * b[:, :rank].double()
                    for share, (_, b), rank in zip(shares, each, held, strict=True)
                ],
                dim=1,
            )
            u, s, vh = product_svd(
                stacked_b, torch.cat([a[:rank] for (a, _), rank in zip(each, held, strict=True)])
            )
            a, b = layer.split(row)
            found = min(layer.rank, len(s))
            a[:found] = vh[:found].to(a)
            b.zero_()
            b[:, :found] = (u[:, :found] * s[:found]).to(b)
        self.soup = self._soup(row)

    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        pair = layer.split(self.soup.rows[self.assigned[client]])
        return pair, update_inner_product(pair, pair)

    def traffic(self, client: int) -> tuple[int, int]:
        return self.held(client), self.held(client)

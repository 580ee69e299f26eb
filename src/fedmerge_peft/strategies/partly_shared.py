"""Adapters with shared and private tensors: private heads, FedRep, FedSA-LoRA; and FFA-LoRA.

FFA-LoRA has frozen tensors instead of private tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import Entry
from fedmerge_peft.adapters.lora_factors import A_SUFFIXES, RANDOM_INIT_SUFFIXES, suffix_mask
from fedmerge_peft.adapters.soup import AdapterSoup, OwnParts
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext
from fedmerge_peft.strategies.fedavg import FedAvg
from fedmerge_peft.strategies.wrapping import WrappedStrategy
from fedmerge_peft.training.plan import Choose, Plan, Train
from fedmerge_peft.util.row_buffer import RowBuffer


class PartlyShared(WrappedStrategy):
    """Wrapper that applies a strategy to some tensors φ of the adapter.

    The strategy's plans must be ``Train`` or ``Choose``, with which a client trains one adapter.

    The other tensors h_i are private to each client. In each round a client trains both at once,
    from φ as sent and its last h_i:

        (φ_i, h_i) ← local training on ℓ_i(φ, h_i)

    The strategy computes the next φ from φ − φ_i, and neither sees nor averages the private parts.
    This class keeps them, adds them to plans, and updates them from replies. ``traffic`` does not
    count them, although they travel across sites. With FedAvg and h = head this is FedPer
    (Arivazhagan et al. 2019, arXiv 1912.00818, algorithm 1).

    All h_i start from the first fresh adapter, and do not change before the client takes part.
    """

    state_fields = (*WrappedStrategy.state_fields, "private_rows")

    def __init__(
        self,
        make: Callable[[StrategyContext], Strategy],
        context: StrategyContext,
        shared: Callable[[Entry], bool],
    ) -> None:
        """Create the strategy of the shared tensors.

        Args:
            make: Function that creates the strategy from a context whose layout and fresh rows
                contain the shared tensors only.
            context: Context with all tensors.
            shared: Function that returns True for the entries of shared tensors.
        """
        layout, self.shared = context.layout.select(shared)
        self.layout, self.tensors = context.layout, context.shared

        def fresh_row(number: int) -> Tensor:
            return context.fresh_row(number)[self.shared]

        super().__init__(make(replace(context, layout=layout, fresh_row=fresh_row)))
        private = context.fresh_row(0)[~self.shared]
        self.private_rows = private.repeat(context.clients, 1)
        """Private parts h, ``(m, P_h)``."""

    @property
    def soup(self) -> AdapterSoup:
        """Soup of the wrapped strategy, with zeros in the private columns, and h as own parts."""
        inner = self.inner.soup
        rows = torch.zeros(len(inner), self.layout.size)
        rows[:, self.shared] = inner.rows
        own = OwnParts(torch.nonzero(~self.shared).flatten(), self.private_rows, private=True)
        if inner.own is not None:
            columns = torch.nonzero(self.shared).flatten()[inner.own.columns]
            own = own.plus(OwnParts(columns, inner.own.residuals))
        blocks = None if inner.blocks is None else inner.blocks.spread(self.shared)
        return AdapterSoup(rows, self.layout, self.tensors, inner.base, own, blocks)

    @soup.setter
    def soup(self, soup: AdapterSoup) -> None:
        self.inner.soup = replace(self.inner.soup, rows=soup.rows[:, self.shared], base=soup.base)

    def plan(self, client: int) -> Plan:
        plan = self.inner.plan(client)
        if isinstance(plan, Train):
            anchor = None if plan.anchor is None else self._join(plan.anchor, client)
            phases = tuple(self._trained(mask) for mask in plan.phases)
            row = self._join(plan.row, client)
            compared = None if plan.compared is None else self._join(plan.compared, client)
            return replace(plan, row=row, phases=phases, anchor=anchor, compared=compared)
        if isinstance(plan, Choose):
            return Choose(self._join(plan.rows, client))
        raise RecipeError(
            "strategy.head: private needs clients that train one adapter in a round (plans Train "
            f"or Choose), but this strategy has {type(plan).__name__} plans; use head: shared"
        )

    def served(self, client: int) -> Tensor:
        served = self.inner.served(client)
        assert isinstance(served, Tensor)  # noqa: S101 (plans with mixtures are refused)
        return self._join(served, client)

    def adapter(self, client: int) -> Tensor:
        return self._join(self.inner.adapter(client), client)

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        shared = RowBuffer(expected_calls=len(replies))
        self.inner.update(
            [
                replace(reply, deltas=shared.append(reply.deltas[:, self.shared]))
                for reply in replies
            ]
        )
        for reply in replies:
            self.private_rows[reply.client] -= reply.delta[~self.shared]

    def gap(self, reply: Reply, trained: Tensor) -> float:
        shared = replace(reply, deltas=reply.deltas[:, self.shared])
        return self.inner.gap(shared, trained[:, self.shared])

    def _join(self, shared: Tensor, client: int) -> Tensor:
        """Combine shared columns and a client's private part into rows ``(P,)`` or ``(k, P)``.

        Args:
            shared: The shared columns, ``(P_φ,)`` or ``(k, P_φ)``.
            client: The client.
        """
        rows = shared.new_empty(*shared.shape[:-1], self.layout.size)
        rows[..., self.shared] = shared
        rows[..., ~self.shared] = self.private_rows[client]
        return rows

    def _trained(self, mask: Tensor | None) -> Tensor | None:
        """Extend a mask of shared columns to a mask ``(P,)`` in which private columns train.

        None, which trains all columns, remains None.
        """
        if mask is None:
            return None
        trained = torch.ones(self.layout.size, dtype=torch.bool)
        trained[self.shared] = mask
        return trained


class PrivateHeads(PartlyShared):
    """Wrapper that applies a strategy to the body of the adapter and keeps the heads private.

    The head consists of the modules that the recipe trains in full.
    """

    def __init__(
        self, name: str, make: Callable[[StrategyContext], Strategy], context: StrategyContext
    ) -> None:
        """Create the strategy of the body.

        Args:
            name: Name of the strategy, for error messages.
            make: As in ``PartlyShared``.
            context: As in ``PartlyShared``.

        Raises:
            RecipeError: The adapter has no head, or consists of a head only.
        """
        heads = [entry.role == "head" for entry in context.layout.entries]
        if not any(heads):
            raise RecipeError(
                f"strategy: {name} keeps the head private, but this adapter has none; "
                "name one in lora.modules_to_save"
            )
        if all(heads):
            raise RecipeError(
                f"strategy: {name} keeps the head private, but this adapter has nothing else; "
                "name modules in lora.target_modules"
            )
        super().__init__(make, context, lambda entry: entry.role != "head")


class FedRep(PrivateHeads):
    """FedAvg of the body φ with private heads h_i. A client trains both in turn:

        h_i on ℓ_i(φ, h) with φ as sent,    then φ on ℓ_i(φ, h_i) with the new head

    Each of the two steps runs all epochs (or optimizer steps) of ``training``. Source: Collins et
    al. 2021, arXiv 2102.07078, algorithm 1.
    """

    def __init__(self, recipe: recipes.FedRepRecipe, context: StrategyContext) -> None:
        super().__init__(recipe.name, lambda inner: FedAvg(recipe, inner), context)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(~self.shared, self.shared))


class FedSALora(PartlyShared):
    """FedAvg of A, with a private B_i and head for each client (Guo et al. 2025, arXiv 2410.01463).

    Clients train the whole adapter. Parameters that are neither factor nor head (trained biases,
    DoRA's magnitudes) are private as well.
    """

    def __init__(self, recipe: recipes.FedSALoraRecipe, context: StrategyContext) -> None:
        if not suffix_mask(context.layout, A_SUFFIXES).any():
            raise RecipeError(
                "lora: fedsa_lora averages A, which is not trained in this adapter; "
                "adapt layers with LoRA (lora.target_modules), and set lora.merge: factor"
            )
        super().__init__(
            lambda inner: FedAvg(recipe, inner),
            context,
            lambda entry: entry.key.endswith(A_SUFFIXES),
        )


class FFALora(FedAvg):
    """FedAvg of B and the head, with A frozen at a common random start:

        B ← Σ_i ρ_i B_i,  so that  Σ_i ρ_i B_i A = B A  exactly.

    A follows from the seed and never travels. On embeddings, PEFT initializes B at random and A
    with zeros, so B is frozen and A trains. Source: Sun et al. 2024, arXiv 2403.12313.
    """

    def __init__(self, recipe: recipes.FFALoraRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        self.columns = self.trained = ~suffix_mask(context.layout, RANDOM_INIT_SUFFIXES)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.trained,))

    def traffic(self, client: int) -> tuple[int, int]:
        trained = int(self.trained.sum())
        return trained, trained

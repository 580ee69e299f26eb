"""FedMerge: a soup of adapters, merged with learned weights for each client (arXiv 2504.06768)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedmerge_peft.adapters.blocks import Blocks
from fedmerge_peft.adapters.merging_weights import MergingWeights
from fedmerge_peft.adapters.soup import OwnParts
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.balancing import balancing_shifts
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack_replies
from fedmerge_peft.strategies.block_logits import BlockLogits, make_blocks
from fedmerge_peft.strategies.group_weights import group_logits, grouping_logits
from fedmerge_peft.strategies.logit_steps import LogitSteps
from fedmerge_peft.strategies.mean_updates import MeanUpdates
from fedmerge_peft.strategies.own_head import OwnHead, decide_own_heads
from fedmerge_peft.strategies.reseeding import Reseeding
from fedmerge_peft.strategies.server_step import weights_gradient
from fedmerge_peft.strategies.similarity import Grouping, group_by_direction, nearest_row
from fedmerge_peft.strategies.stored_soup import make_server, make_soup
from fedmerge_peft.strategies.validation_trial import GroupTrials
from fedmerge_peft.training.plan import Plan, Train
from fedmerge_peft.util.row_storage import read

_ADAPTERS = 5
"""d with ``adapters: auto`` if clients are not grouped: the default of the authors' code."""
_OWN_HEAD_MOMENTUM = 0.5
"""Momentum of the server if clients have own heads and share one adapter. It is not set by a recipe
with a momentum or a defense. The mean of updates on different labels is small, so that the adapter
learns slowly without momentum."""


class FedMerge(Strategy):
    """θ_i = Σ_j π_ij Θ_j with π = softmax(W / T).

    Each round updates W first, then Θ with the new π (``server_step.py`` defines the symbols):

    W_i ← W_i − step(G_i),            G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩
    Θ_j ← Θ_j − η Σ_i q_ij δ_i,       q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i'

    ``logit_steps.py`` defines the step for each rule. ``rule: gradient`` has another soup step.

    With ``start: warm``, the first ``warm_rounds`` rounds are FedAvg: all adapters are equal. At
    the end of the last of them, the server groups the clients by the directions of their updates.
    The updates also determine the number of groups, unless the recipe sets it. The soup step of
    that round uses the new π and gives each group its own adapter.

    If the clients of a group have different distributions of labels, each client also gets an own
    part of the head (``own_head.py``), and the server of a single adapter has momentum.

    With ``blocks``, W has a row for each client and block of columns (``block_logits.py``). Each
    block then has its own grouping and steps.

    After the grouping, the server tests it by validation losses, unless ``trials`` is None
    (``validation_trial.py``). If groups bring no gain, all clients share the mean adapter. If
    merging raises the loss, each client gets an adapter and small weights for the other adapters.
    """

    state_fields = (
        "server",
        "merging",
        "shifts",
        "steps",
        "_warming",
        "_reseeding",
        "own_head",
        "by_block",
        "joined",
        "rounds",
        "trials",
    )
    learns_weights = True

    def __init__(self, recipe: recipes.FedMergeRecipe, context: StrategyContext) -> None:
        self.recipe = recipe
        self.context = context
        self.head = context.layout.columns("head")
        """Columns of the head, ``(h,)`` int64."""
        if recipe.own_head is True and len(self.head) == 0:
            raise RecipeError(
                "strategy.own_head: this adapter has no head; use auto, "
                "or name the head in lora.modules_to_save"
            )
        self.blocks = make_blocks(recipe, context)
        self._warming = MeanUpdates(context) if recipe.start == "warm" else None
        number = 1 if self._warming is not None else min(_ADAPTERS, context.clients)
        adapters = number if recipe.adapters == "auto" else recipe.adapters
        self.soup = make_soup(recipe, context, adapters)
        self.server = make_server(recipe, context, self.soup)
        self._set_weights(adapters)
        self.own_head: OwnHead | None = None
        """Own heads of the clients; None before the grouping, or if the head is shared."""
        self.joined = torch.full((context.clients,), self._warming is None)
        """True for clients with a group, ``(m,)``; all are True without ``start: warm``."""
        self.rounds = 0
        automatic = (
            self._warming is not None
            and (recipe.adapters, recipe.groups) == ("auto", None)
            and recipe.own_head is not True
            and context.validation
            and not context.aggregator.recipe.defends  # reported losses may be false
        )
        self.trials = GroupTrials(context.clients) if automatic else None
        """Trials after the grouping; None if the recipe or the federation rules them out."""
        self._decided: list[str] = []
        self._mean: Tensor | None = None  # cached result of _mean_adapter in this round

    def _set_weights(self, adapters: int) -> None:
        """Start with uniform weights over this number of adapters."""
        recipe, context = self.recipe, self.context
        self.merging = MergingWeights.uniform(context.clients, adapters)
        self.shifts = torch.zeros(adapters, dtype=torch.float64)
        """Balancing shifts of the adapters' logits, ``(d,)`` float64."""
        self.steps = LogitSteps(recipe, context, adapters)
        self._reseeding = (
            Reseeding(recipe.reseed_after, adapters, context.seed) if recipe.reseed_after else None
        )
        self.by_block: BlockLogits | None = None
        """Logits by block, in place of ``merging``; None without blocks, or before the grouping."""
        if self.blocks is not None and self._warming is None:
            self._begin_blocks(self.blocks)

    def _begin_blocks(self, blocks: Blocks) -> BlockLogits:
        self.by_block = BlockLogits(self.recipe, self.context, blocks, self.merging.logits)
        return self.by_block

    def resize(self, adapters: int) -> None:
        if self.recipe.adapters != "auto" or len(self.soup) != 1:
            super().resize(adapters)
        self.soup = self.soup.with_rows(self.soup.rows.expand(adapters, -1), adapters)
        self.server.repeat(adapters)
        self._set_weights(adapters)

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        if "own_head.rows" in state:
            self.own_head = OwnHead.empty(self.context, self.head)
        if "by_block.logits" in state and self.blocks is not None:
            self._begin_blocks(self.blocks)
        super().load_state_dict(state)
        self._set_momentum()
        self._store_parts()

    @property
    def weights(self) -> Tensor:
        if self.by_block is not None:
            return self.by_block.mean()
        return self._softmax(self.merging.logits)

    def adapter(self, client: int) -> Tensor:
        if self._warming is not None:  # all rows equal FedAvg's adapter, bit for bit
            return read(self.soup.rows[:1], slice(None))[0].clone()
        if self.by_block is not None:
            return self.by_block.merge(self.soup.rows, client)
        merged = self._merged(client)
        return merged if self.own_head is None else self.own_head.added(merged, client)

    def _merged(self, client: int) -> Tensor:
        return self.soup.merge(self._softmax(self.merging.logits[client]))

    def decisions(self) -> list[str]:
        return self._decided

    def validates(self) -> bool:
        after = self.rounds >= self.recipe.warm_rounds
        return after and self.trials is not None and self.trials.running

    def plan(self, client: int) -> Plan:
        compared = self._common_adapter(client) if self._compares() else None
        if self.own_head is not None:
            return self.own_head.plan(self._merged(client), client, compared)
        return Train(self.adapter(client), compared=compared)

    def traffic(self, client: int) -> tuple[int, int]:
        size = self.soup.layout.size
        return (2 * size if self._compares() else size), size

    def _compares(self) -> bool:
        """Return True while clients compare the groups with one adapter for all clients."""
        return self._warming is None and self.trials is not None and self.trials.common is not None

    def _common_adapter(self, client: int) -> Tensor:
        """Return ``_mean_adapter`` with the client's own head if it has one, ``(P,)``."""
        common = self._mean_adapter()
        return common if self.own_head is None else self.own_head.added(common, client)

    def _mean_adapter(self) -> Tensor:
        """Return the mean merged adapter, without own heads, of clients with a group, ``(P,)``."""
        if self._mean is None:
            self._mean = self.soup.merge(self.weights[self.joined].mean(dim=0))
        return self._mean

    def _weights_of(self, clients: Tensor) -> Tensor:
        """Return π of these clients, ``(k, d)``; without blocks, only these rows are computed."""
        logits = self.merging.logits[clients]
        return self._softmax(logits) if self.by_block is None else self.weights[clients]

    def _softmax(self, logits: Tensor) -> Tensor:
        shifted = (logits / self.recipe.temperature).double() + self.shifts
        return torch.softmax(shifted, dim=-1).float()

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        clients, deltas, sizes = stack_replies(replies)
        deltas = self.aggregator.clip(deltas)
        if self.own_head is not None:
            self.own_head.update(replies)
        self._decided = []
        self.rounds += 1
        if self.trials is not None and self._warming is None:
            self._try_groups(self.trials, replies)
        if (warming := self._warming) is not None:
            warming.add(clients, deltas)
            if self.rounds == self.recipe.warm_rounds:
                self._group(warming)
                self._warming = None
        before = self._weights_of(clients).double()
        if warming is None:
            self._join(clients, deltas)
            self._step_weights(clients, before, deltas, sizes)
        self._balance()
        gradient = partial(self._soup_gradient, clients, before, deltas, sizes)
        self.soup.rows = self.server.step_columns(self.soup.rows, gradient, self.rounds)
        self._mean = None
        self._store_parts()

    def _step_weights(self, clients: Tensor, before: Tensor, deltas: Tensor, sizes: Tensor) -> None:
        """Take the step W_i ← W_i − step(G_i), in place; arguments as in ``_soup_gradient``."""
        votes = self.aggregator.votes(sizes)
        shares = votes / votes.sum()
        if self.by_block is not None:
            self.by_block.step(self.soup.rows, clients, deltas, shares)
            return
        gradient = weights_gradient(
            self.soup.rows, before, deltas, self.steps.columns, self.aggregator.update_norms
        )
        gradient /= self.recipe.temperature
        self.merging.logits[clients] -= self.steps.compute(clients, gradient, shares).float()
        if self._reseeding is not None:
            self._reseeding.apply(
                self.soup.rows, self.merging.logits, self.weights, clients, deltas
            )

    def _balance(self) -> None:
        self.shifts = torch.zeros_like(self.shifts)
        if self.rounds < self.recipe.balance_rounds:
            shifts = balancing_shifts(self.merging.logits / self.recipe.temperature)
            self.shifts = (1 - self.rounds / self.recipe.balance_rounds) * shifts

    def _soup_gradient(
        self, clients: Tensor, before: Tensor, deltas: Tensor, sizes: Tensor, columns: slice
    ) -> Tensor:
        """Combine the updates of some clients into the gradient of Θ in w columns, ``(d, w)``.

        Before the grouping, all rows have FedAvg's gradient, which ``rule: gradient`` divides by d.

        Args:
            clients: Client indices, ``(k,)``.
            before: π of these clients before the round's step of W, ``(k, d)`` float64.
            deltas: δ, ``(k, P)``.
            sizes: n, ``(k,)``.
            columns: The w columns.
        """
        deltas = deltas[:, columns]
        chain_rule = self.recipe.rule == "gradient"
        if self._warming is not None:
            common = self.aggregator.combine(deltas, torch.ones(len(sizes), 1), sizes)
            return (common / len(self.soup) if chain_rule else common).expand(len(self.soup), -1)
        if self.by_block is not None:
            combine = partial(self.aggregator.combine, sizes=sizes)
            return self.by_block.gradient(clients, deltas, combine)
        weights = before if chain_rule else self._weights_of(clients)
        return self.aggregator.combine(deltas, weights, sizes, normalize=not chain_rule)

    def _group(self, updates: MeanUpdates) -> None:
        """Group the clients, and set the number of adapters, W and the own heads accordingly.

        Clients that have not taken part yet keep uniform weights until their first reply.
        """
        means = updates.means()
        ones = torch.ones(len(means), 1)
        center = (
            self.aggregator.combine(torch.nn.functional.normalize(means, dim=1), ones, ones[:, 0])
            if self.aggregator.recipe.defends
            else None
        )
        adapters = self.recipe.adapters
        grouping = group_by_direction(
            means,
            self.context.clients if adapters == "auto" else adapters,
            self.context.seed,
            count=self.recipe.groups,
            center=center,
            repeatability=updates.repeatability(),
        )
        if adapters == "auto":
            self.resize(int(grouping.groups.max()) + 1)
        number = int(grouping.groups.max()) + 1
        self.joined[updates.clients] = True
        self.merging.logits[updates.clients] = self._logits(grouping)
        if self.blocks is not None:
            count = self.recipe.groups or len(self.soup)
            self._begin_blocks(self.blocks).set(
                updates.clients,
                lambda columns: self._logits(
                    group_by_direction(means[:, columns], count, self.context.seed, count=count)
                ),
            )
        if self.trials is not None:
            self.trials.begin(number, blocks=self.blocks is not None)
        self._decided = [f"{number} group{'s' * (number > 1)} of clients: {grouping.reason}"]
        if self.blocks is None:
            self.own_head, reason = decide_own_heads(
                self.recipe.own_head, self.context, self.head, updates.clients, grouping.groups
            )
            self._decided += reason
            self._set_momentum()

    def _try_groups(self, trials: GroupTrials, replies: Sequence[Reply]) -> None:
        """Run the trials on a round's replies, and apply their outcomes."""
        for outcome, reason in trials.decide(self.rounds - self.recipe.warm_rounds, replies):
            if outcome == "share":
                self._share()
            elif outcome == "separate":
                self._separate()
            self._decided.append(reason)

    def _share(self) -> None:
        """Replace the soup by one adapter for all clients, the mean of their merged adapters."""
        self.soup = replace(self.soup.with_rows(self._mean_adapter()[None], 1), own=None)
        self.server = make_server(self.recipe, self.context, self.soup)
        self._set_momentum()
        self._set_weights(1)

    def _separate(self) -> None:
        """Give each client its own adapter, which starts as the one that it is served."""
        everyone = range(self.context.clients)
        soup = self.soup.with_rows(map(self.adapter, everyone), len(everyone))
        self.soup = replace(soup, own=None, blocks=None)
        self.server = make_server(self.recipe, self.context, self.soup)
        self.blocks = None
        self._set_weights(len(soup))
        self.own_head = None
        self.joined[:] = True
        self.merging.logits[:] = self._logits(torch.tensor(everyone))

    def _join(self, clients: Tensor, deltas: Tensor) -> None:
        """Assign clients that missed the grouping to the adapter that their first update points to.

        These clients trained the mean adapter, because their weights were uniform.
        """
        new = ~self.joined[clients]
        if len(self.soup) == 1 or not new.any():
            return
        joining, first = clients[new], deltas[new]
        self.joined[joining] = True
        self.merging.logits[joining] = self._logits(nearest_row(first, self.soup.rows))
        if self.by_block is not None:
            self.by_block.set(
                joining,
                lambda columns: self._logits(
                    nearest_row(first[:, columns], self.soup.rows[:, columns])
                ),
            )

    def _logits(self, grouping: Grouping | Tensor) -> Tensor:
        """Return the initial logits ``(k, d)`` of k clients from a grouping or groups ``(k,)``."""
        adapters, weight = len(self.soup), self.recipe.warm_weight
        if isinstance(grouping, Tensor):
            return self.recipe.temperature * group_logits(grouping, adapters, weight)
        return self.recipe.temperature * grouping_logits(grouping, adapters, weight)

    def _set_momentum(self) -> None:
        if self.own_head and len(self.soup) == 1 and not self.context.aggregator.recipe.defends:
            self.server.set_default_momentum(_OWN_HEAD_MOMENTUM)

    def _store_parts(self) -> None:
        """Store the weights by block and the own parts in the soup, which saves them."""
        self.soup.blocks = None if self.by_block is None else self.by_block.offsets()
        if self.own_head is not None:
            self.soup.own = OwnParts(self.head, self.own_head.rows)

    def warnings(self) -> list[str]:
        if self.recipe.start == "identical":
            return [
                "all adapters start equal and stay equal, so every client is served the same "
                "adapter. Use strategy.start=warm"
            ]
        if self._warming is not None:
            return [
                f"until clients are grouped after round {self.recipe.warm_rounds}, "
                f"all share one adapter, as in FedAvg; completed rounds: {self.rounds}"
            ]
        return super().warnings()

"""Sections of the built-in strategies, except those in ``personal_strategies``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.registered import OneOf
from fedmerge_peft.recipe.section import (
    Adapters,
    Boolean,
    Coefficient,
    Count,
    CountOrZero,
    Fraction,
    Passes,
    PositiveCoefficient,
    Rank,
    WarmRounds,
)
from fedmerge_peft.recipe.soup_storage import SoupServerRecipe
from fedmerge_peft.recipe.strategy_base import WEIGHTS_LR, HeadRecipe, ServerRecipe, StrategyRecipe

Ranks = Annotated[list[Rank], Field(min_length=1)]


# ---- Soups ---------------------------------------------------------------------------------------
class FedMergeRecipe(HeadRecipe, SoupServerRecipe):
    """A soup of adapters, merged for each client by learned weights (arXiv 2504.06768)."""

    shared_soup = True
    learned_merging = True
    dp_modes = frozenset({"local", "central"})
    preset: Literal["paper"] | None = None
    """paper: values of the authors' CIFAR-100 program in place of the defaults: 500 rounds;
    adapters 5, rule paper, start independent; SGD with learning rate 0.01, batches of 32, 2 epochs,
    proximal 0.01 and no clipping; evaluation.serve best, which serves the round with the lowest
    validation loss. Keys that the recipe sets keep their values."""
    adapters: Adapters | Literal["auto"] = "auto"
    """d, the number of adapters in the soup. auto: with `start: warm`, the number of groups, which
    may be one. If `groups` is not set, validation losses in the next rounds may change the number
    to one adapter for all clients, or to one for each client. With other starts 5, or the number of
    clients if that is smaller."""
    rule: Literal["normalized", "adam", "gradient", "paper"] = "normalized"
    """Update rule of the weights. normalized: gradient descent, after each client's gradient is
    divided by its largest absolute entry. adam: Adam. gradient: plain gradient descent. paper: the
    rule of FedMerge's authors (method.md)."""
    weights_lr: Coefficient | None = None
    """Step size of the merging logits. Default: 0.3; 1.0 for gradient; 0.01 for paper."""
    weights_columns: Literal["all", "head"] | None = None
    """Parameters in the inner product of the weights' gradient: the whole adapter (all), or only
    the head. Default: all; for the rule paper, head if there is one, as in the authors' code."""
    weights_memory: Fraction = 0.0
    """Decay of the exponential average of the weights' gradient over a client's rounds. 0 uses only
    the current round."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """The merging weights are softmax(W / temperature). Values below 1 sharpen them."""
    balance_rounds: CountOrZero = 0
    """Number of rounds at the start in which the adapters' mass is balanced (Sinkhorn), so that no
    adapter becomes unused early. The strength of the balancing decreases linearly to zero."""
    start: Literal["independent", "noise", "warm", "identical"] = "warm"
    """Initialization of the adapters. warm: a few rounds of FedAvg, then clients are grouped by the
    direction of their updates, and each group gets an adapter. independent: random and different,
    as in the paper; suitable for central privacy, which rules out warm. noise: equal, plus noise on
    all parameters. identical: equal, for tests only, because equal adapters never specialize."""
    start_noise: Annotated[float, Field(gt=0, le=10)] = 0.02
    """Standard deviation of the noise of `start: noise`."""
    warm_rounds: WarmRounds = 3
    """Rounds of `start: warm` before the grouping. A run with fewer rounds trains one adapter,
    with a warning."""
    groups: Adapters | None = None
    """Number of groups of `start: warm`. Default: inferred from the updates, at most `adapters`."""
    warm_weight: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Merging weight, right after the grouping, of the adapter of the group that a client resembles
    most. The key sets the mean of this weight over the clients. A client that resembles several
    groups starts with a mixture of their adapters. With more adapters than groups, each client has
    this weight for its group's adapter, and the other adapters share the rest evenly."""
    own_head: Boolean | Literal["auto"] = "auto"
    """True for an own head of each client after the grouping of `start: warm`. It is added to the
    head that is merged from the soup, and changes only by its client's updates. In each round,
    clients then train the merged adapter, and their own head after it. auto: true if the clients of
    a group differ in their label distributions, and the server knows their label counts."""
    blocks: Literal["head", "layers", "modules", "classes"] | None = None
    """Separate merging weights for each block of an adapter's parameters. Default: no blocks.
    head: the head, and the rest. layers: each layer of the backbone, the head, and the rest.
    modules: each adapted module, and the head. classes: the parameters of each class in the head's
    last layer, and the rest. With blocks, there are no own heads."""
    reseed_after: Count | None = None
    """Number of consecutive rounds after which an unused adapter is reassigned to some clients of
    the most used adapter. An adapter is unused if its mass is below 1 / (4 d). Default: never."""

    @property
    def rounds_with_one_adapter(self) -> int:
        return self.warm_rounds if self.start == "warm" else 0

    def effective_values(self) -> dict[str, Any]:
        own = self.start == "warm" and self.own_head is not False and self.server_optimizer == "sgd"
        chosen = {"server_momentum": self.server_momentum} if own else {}  # None: the run decides
        lr = WEIGHTS_LR[self.rule] if self.weights_lr is None else self.weights_lr
        columns = self.weights_columns or (None if self.rule == "paper" else "all")
        return super().effective_values() | chosen | {"weights_lr": lr, "weights_columns": columns}

    @property
    def merged_blocks(self) -> str | None:
        return self.blocks

    @property
    def chosen_preset(self) -> str | None:
        return self.preset

    @model_validator(mode="after")
    def _a_group_has_an_adapter(self) -> FedMergeRecipe:
        if self.groups is not None and self.adapters != "auto" and self.groups > self.adapters:
            raise ValueError(
                f"groups: {self.groups} groups need {self.groups} adapters, but adapters is "
                f"{self.adapters}; raise adapters, or lower groups"
            )
        return self

    @model_validator(mode="after")
    def _own_heads_follow_a_grouping_of_shared_heads(self) -> FedMergeRecipe:
        if self.own_head is True and self.start != "warm":
            raise ValueError(
                f"own_head: own heads begin at the grouping of start: warm, but start is "
                f"{self.start}; remove one of them"
            )
        if self.own_head is True and self.private_head:
            raise ValueError("own_head: needs a shared head, but head is private; remove one")
        return self

    @model_validator(mode="after")
    def _blocks_have_plain_steps(self) -> FedMergeRecipe:
        others = {
            f"rule: {self.rule}": self.rule in ("paper", "gradient"),
            f"weights_columns: {self.weights_columns}": self.weights_columns == "head",
            f"own_head: {self.own_head}": self.own_head is True,
            f"balance_rounds: {self.balance_rounds}": self.balance_rounds > 0,
            f"reseed_after: {self.reseed_after}": self.reseed_after is not None,
        }
        if self.blocks is not None and (given := [key for key, there in others.items() if there]):
            raise ValueError(
                f"blocks: weights by block cannot be combined with {given[0]}; remove one of them"
            )
        return self

    def privacy_refusal(self, mode: str) -> str | None:
        weights = "changes merging weights by the updates of other clients"
        exposed = {
            f"blocks: {self.blocks} uses a sum of updates for each block": self.blocks is not None,
            "start: warm groups clients by the updates of other clients": self.start == "warm",
            f"rule: {self.rule} {weights}": self.rule in ("paper", "gradient"),
            f"reseed_after {weights}": self.reseed_after is not None,
            f"balance_rounds {weights}": self.balance_rounds > 0,
        }
        if mode == "central" and (given := [what for what, applies in exposed.items() if applies]):
            return (
                f"strategy.{given[0]}, which central noise does not protect; "
                "use privacy.mode=local, or change this setting"
            )
        if mode != "none" and self.own_head is True:
            return "strategy.own_head: own heads would be sent without noise; use own_head=false"
        return super().privacy_refusal(mode)


# ---- One model for all, or one for each ----------------------------------------------------------
class FedAvgRecipe(HeadRecipe, ServerRecipe):
    """One global adapter for all clients (McMahan 2017; with LoRA, FedIT)."""

    dp_modes = frozenset({"local", "central"})


class FedAvgFinetunedRecipe(HeadRecipe, ServerRecipe):
    """FedAvg with finetuning: each client predicts with a finetuned copy of the global adapter."""

    fedavg_rounds: Count | None = None
    """Number of rounds of FedAvg. In all further rounds, each client finetunes its own copy of the
    global adapter. Default: all rounds are rounds of FedAvg, and a client predicts with the adapter
    that it trained in its last round, before the aggregation."""
    passes: Passes = 1
    """Passes of local training in each round after `fedavg_rounds`. Each pass takes
    training.epochs or training.steps."""

    @property
    def passes_per_round(self) -> int:
        return self.passes

    @model_validator(mode="after")
    def _passes_have_rounds(self) -> FedAvgFinetunedRecipe:
        if self.passes > 1 and self.fedavg_rounds is None:
            raise ValueError("passes: there are no rounds of finetuning; set fedavg_rounds")
        return self


class FedProxRecipe(HeadRecipe, ServerRecipe):
    """FedAvg with a proximal term in local training (Li et al. 2020, arXiv 1812.06127)."""

    dp_modes = frozenset({"local", "central"})
    mu: PositiveCoefficient = 0.1
    """mu of the term mu / 2 · ‖θ − θ_sent‖², which replaces training.proximal."""


class LocalRecipe(StrategyRecipe):
    """Local training only, from the same initialization for all clients."""

    federated = False


class DittoRecipe(ServerRecipe):
    """Private adapters, regularized toward FedAvg's global adapter (Li et al. 2021, arXiv
    2012.04221).
    """

    regularization: PositiveCoefficient = 0.1
    """lambda of the term lambda / 2 · ‖private − global‖²."""


class FedPerRecipe(ServerRecipe):
    """A shared body and private heads, trained together (Arivazhagan et al. 2019, arXiv
    1912.00818).
    """

    @property
    def private_head(self) -> bool:
        return True


class FedRepRecipe(ServerRecipe):
    """A shared body and private heads, trained alternately (Collins et al. 2021, arXiv
    2102.07078).
    """


class FedRoDRecipe(ServerRecipe):
    """A generic head with a balanced loss, plus personal heads (Chen & Chao 2022, arXiv
    2107.00778).
    """

    needs_labels = True


class FedDPARecipe(ServerRecipe):
    """Dual-personalizing adapters: half of the rank is global, half is private, and both halves are
    active (Yang et al. 2024, arXiv 2403.19211).
    """


class FedALTRecipe(ServerRecipe):
    """Private adapters in half of the rank; the other half is the frozen mean of the other clients'
    private adapters (Bian et al. 2026, arXiv 2503.11880).
    """


# ---- Clusters and mixtures -----------------------------------------------------------------------
class IFCARecipe(HeadRecipe, StrategyRecipe):
    """Clusters: each client trains the adapter with the lowest loss on its data (Ghosh et al. 2020,
    arXiv 2006.04088).
    """

    shared_soup = True
    adapters: Adapters = 5
    """Number of clusters. Each client receives the adapters of all clusters."""


class FeSEMRecipe(HeadRecipe, StrategyRecipe):
    """Clusters: each client belongs to the cluster whose center is nearest to its trained adapter
    (Long et al. 2023, arXiv 2108.08647).
    """

    shared_soup = True
    dp_modes = frozenset({"local"})
    adapters: Adapters = 5
    """Number of clusters."""


class FLHCRecipe(HeadRecipe, StrategyRecipe):
    """Rounds of FedAvg, then hierarchical clustering of the updates, then FedAvg in each cluster
    (Briggs et al. 2020, arXiv 2004.11791).
    """

    shared_soup = True
    dp_modes = frozenset({"local"})
    adapters: Adapters = 5
    """Number of clusters."""
    warm_rounds: WarmRounds = 2
    """Rounds of FedAvg before the clustering, or more until `adapters` clients (or all) replied.
    A run with fewer rounds trains one adapter, with a warning."""
    metric: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    """Distance between updates."""
    linkage: Literal["average", "complete", "single"] = "average"
    """Distance between clusters."""

    @property
    def rounds_with_one_adapter(self) -> int:
        return self.warm_rounds


class FedLEASERecipe(HeadRecipe, ServerRecipe):
    """Clusters of clients by their LoRA factors B after local training; the silhouette determines
    the number of clusters (Wang et al. 2025, arXiv 2509.15087).
    """

    shared_soup = True
    adapters: Adapters = 5
    """Maximum number of clusters."""
    warm_passes: Passes = 1
    """Passes of local training before the clustering. Each pass takes training.epochs or
    training.steps."""


class FedEMRecipe(StrategyRecipe):
    """A mixture of adapters for each client, trained by expectation-maximization (Marfoq et al.
    2021, arXiv 2108.10252).
    """

    single_adapter = False
    adapters: Adapters = 3
    """Number of components. Each client receives, trains and returns all of them."""


# ---- Other ways to aggregate LoRA ----------------------------------------------------------------
class FFALoraRecipe(HeadRecipe, ServerRecipe):
    """A is random and frozen; only B and the head are trained and sent (Sun et al. 2024, arXiv
    2403.12313).
    """

    dp_modes = frozenset({"local", "central"})


class FedSALoraRecipe(ServerRecipe):
    """A is shared; B and the head are private (Guo et al. 2025, arXiv 2410.01463)."""


class RoLoraRecipe(HeadRecipe, ServerRecipe):
    """Clients train and send B in odd rounds, A in even rounds (on embeddings, A first), and the
    head in all rounds (Chen et al. 2025, arXiv 2502.01755).
    """

    dp_modes = frozenset({"local", "central"})


class FlexLoraRecipe(HeadRecipe, StrategyRecipe):
    """The mean of the clients' products B A, reduced to each client's rank by SVD (Bai et al. 2024,
    arXiv 2402.11505).
    """

    ranks: Ranks | None = None
    """Ranks of the clients in order, repeated as needed; each at most lora.r. Default: lora.r."""


class FLoraRecipe(HeadRecipe, StrategyRecipe):
    """The clients' stacked factors are added to the backbone, and each round starts with new
    factors (Wang et al. 2024, arXiv 2409.05976).
    """

    adds_to_backbone = True
    ranks: Ranks | None = None
    """Ranks of the clients in order, repeated as needed; each at most lora.r. Default: lora.r."""


class FedExLoraRecipe(HeadRecipe, StrategyRecipe):
    """FedAvg of A and B, with the error of this average added to the backbone (Singhal et al. 2025,
    arXiv 2410.09432).
    """

    adds_to_backbone = True
    ranks: ClassVar[Ranks | None] = None
    """None: all clients train factors of rank lora.r."""


_BUILT_IN = (
    ("fedmerge", FedMergeRecipe, "fedmerge:FedMerge"),
    ("fedavg", FedAvgRecipe, "fedavg:FedAvg"),
    ("fedavg_ft", FedAvgFinetunedRecipe, "fedavg_finetuned:FedAvgFinetuned"),
    ("fedprox", FedProxRecipe, "fedavg:FedProx"),
    ("local", LocalRecipe, "local:Local"),
    ("ditto", DittoRecipe, "ditto:Ditto"),
    ("fedper", FedPerRecipe, "fedavg:FedAvg"),
    ("fedrep", FedRepRecipe, "partly_shared:FedRep"),
    ("fedrod", FedRoDRecipe, "fedrod:FedRoD"),
    ("feddpa", FedDPARecipe, "feddpa:FedDPA"),
    ("fedalt", FedALTRecipe, "fedalt:FedALT"),
    ("ifca", IFCARecipe, "ifca:IFCA"),
    ("fesem", FeSEMRecipe, "fesem:FeSEM"),
    ("flhc", FLHCRecipe, "flhc:FLHC"),
    ("fedlease", FedLEASERecipe, "fedlease:FedLEASE"),
    ("fedem", FedEMRecipe, "fedem:FedEM"),
    ("ffa_lora", FFALoraRecipe, "partly_shared:FFALora"),
    ("fedsa_lora", FedSALoraRecipe, "partly_shared:FedSALora"),
    ("rolora", RoLoraRecipe, "rolora:RoLora"),
    ("flexlora", FlexLoraRecipe, "flexlora:FlexLora"),
    ("flora", FLoraRecipe, "flora:FLora"),
    ("fedex_lora", FedExLoraRecipe, "flora:FedExLora"),
)
for _name, _recipe, _code in _BUILT_IN:
    STRATEGIES.add(_name, f"fedmerge_peft.strategies.{_code}", recipe=_recipe)

AnyStrategy = Annotated[StrategyRecipe, OneOf(STRATEGIES)]
"""A section of any registered strategy."""

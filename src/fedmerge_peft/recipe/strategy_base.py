"""Base classes of the strategies' sections: settings of several strategies, and facts that can be
read without importing torch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from fedmerge_peft.recipe.section import Fraction, Rate, Section


class StrategyRecipe(Section):
    """Base of a strategy's section: its settings as fields, and facts about it as class
    attributes.
    """

    name: str = ""
    """Name of the strategy."""

    federated: ClassVar[bool] = True
    """True if adapters are sent between server and clients; False for local training."""
    single_adapter: ClassVar[bool] = True
    """True if each client is served one adapter; False if the predictions of several are mixed."""
    adds_to_backbone: ClassVar[bool] = False
    """True if the server also changes the backbone's weights. The ranks of exported adapters then
    differ by layer."""
    measures_features: ClassVar[bool] = False
    """True if clients also return statistics of their features. Sites do not return such
    statistics, so a federation across sites refuses the strategy."""
    needs_labels: ClassVar[bool] = False
    """True if each example must have one label, because the method depends on the classes."""
    shared_soup: ClassVar[bool] = False
    """True if every adapter of the soup may be merged for any client, including newcomers."""
    learned_merging: ClassVar[bool] = False
    """True if clients are served weighted averages of the soup with learned weights. Tables and
    figures then show these weights."""
    adapters_key: ClassVar[str] = "adapters"
    """Key of the section that sets the number of adapters. A number of adapters that does not fit
    into memory is refused, with this key in the error."""
    dp_modes: ClassVar[frozenset[str]] = frozenset()
    """Values of ``privacy.mode`` that protect everything that the strategy shares."""

    @property
    def rounds_with_one_adapter(self) -> int:
        """Number of rounds before clients are grouped; 0 if the method has no such rounds."""
        return 0

    @property
    def passes_per_round(self) -> int:
        """Largest number of passes of local training in a round, without those of a warm-up."""
        return 1

    @property
    def requested_adapters(self) -> int | Literal["auto"] | None:
        """Value of the section's key ``adapters``; None if the section has no such key."""
        return getattr(self, "adapters", None)

    @property
    def floats_in_memory(self) -> float:
        """Memory that each number of the server's adapters takes, in units of 4 bytes."""
        return 1.0

    @property
    def merged_blocks(self) -> str | None:
        """Kind of blocks with separate merging weights; None if weights are for whole adapters."""
        return None

    @property
    def chosen_preset(self) -> str | None:
        """Name of the preset that fills keys of the whole recipe; None without one."""
        return None

    @property
    def private_head(self) -> bool:
        """True if ``make_strategy`` applies the method to the adapter without its head.

        The heads then stay at the clients. Strategies that divide the adapter themselves, such as
        ``fedrep``, have False.
        """
        return False

    def effective_values(self) -> dict[str, Any]:
        """Return effective values, by key, for keys with a default that depends on another key."""
        return {}

    @property
    def in_chunks(self) -> bool:
        """True if the server computes its adapters in chunks of columns."""
        return False

    def privacy_refusal(self, mode: str) -> str | None:
        """Return the reason why these settings rule out a mode of ``dp_modes``, or None."""
        return None

    def quantization_refusal(self, quantization: str | None) -> str | None:
        """Return the reason why the strategy rules out a quantization of the backbone, or None."""
        if quantization is None or not self.adds_to_backbone:
            return None
        return (
            f"backbone.quantization: {self.name} adds its updates to the backbone's weights, but "
            f"quantized weights ({quantization}) cannot be updated; remove "
            f"backbone.quantization, or the strategy {self.name}"
        )


WEIGHTS_LR = {"normalized": 0.3, "adam": 0.3, "gradient": 1.0, "paper": 0.01}
"""Default step size of FedMerge's merging logits, by rule."""


class ServerRecipe(StrategyRecipe):
    """Base of the sections of strategies with a server optimizer (FedOpt: Reddi et al. 2021, arXiv
    2003.00295).
    """

    server_optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the server. Its gradient is the mean update of the clients. sgd: SGD, as in
    FedAvg. adam: Adam (FedAdam)."""
    server_lr: Rate | None = None
    """Step size of the server. Default: 1 for sgd, as in FedAvg, and 0.01 for adam."""
    server_momentum: Fraction | None = None
    """Momentum of sgd (FedAvgM), default 0; for fedmerge, 0.5 from the round on in which clients
    with own heads share one adapter. For adam, beta_1, default 0.9."""

    @property
    def lr(self) -> float:
        """``server_lr``, or its default."""
        return (
            self.server_lr
            if self.server_lr is not None
            else {"sgd": 1.0, "adam": 0.01}[self.server_optimizer]
        )

    @property
    def momentum(self) -> float:
        """``server_momentum``, or its default."""
        return (
            self.server_momentum
            if self.server_momentum is not None
            else {"sgd": 0.0, "adam": 0.9}[self.server_optimizer]
        )

    def effective_values(self) -> dict[str, Any]:
        return {"server_lr": self.lr, "server_momentum": self.momentum}


class HeadRecipe(Section):
    """Choice between a shared head and private heads."""

    head: Literal["shared", "private"] = "shared"
    """shared: clients send the head with the rest of the adapter, and the server aggregates it.
    private: each client trains a separate head, which stays at the client, as in FedPer
    (Arivazhagan et al. 2019, arXiv 1912.00818); only the rest of the adapter is shared."""

    @property
    def private_head(self) -> bool:
        """True if the recipe chooses private heads."""
        return self.head == "private"

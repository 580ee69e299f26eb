"""Client-level differential privacy: a section of the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from fedmerge_peft.recipe import strategies
from fedmerge_peft.recipe.section import Section

_NOISY = ("fedmerge", "fedavg", "fedprox", "ffa_lora")
_CENTRAL = _NOISY
_LOCAL = (*_NOISY, "fesem", "flhc")


class PrivacyRecipe(Section):
    """Client-level differential privacy: what is learned of a client from what it sends, or from the adapters, all rounds together."""

    mode: Literal["none", "local", "central"] = "none"
    """local: each client clips its update and adds noise to it before it sends it; the server need not be trusted. central: each client
    clips, and the server adds noise to the sums that make the adapters; clients must trust the server and its records, not each other."""
    clip: PositiveFloat = 1.0
    """C, the L2 norm that updates are clipped to."""
    noise: PositiveFloat = 1.0
    """z: the noise's standard deviation in units of how far one client can move what is noised (local: 2 C, from any update to any other;
    central: docs/privacy.md). Drawn from the run's seed, so that a run repeats: who knows the seed can take the noise off again. A
    federation whose clients are real must draw it from elsewhere."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """δ of the (ε, δ) that is reported; well below one part in the number of clients."""

    def refusal(self, strategy: strategies.StrategySection) -> str | None:
        """Why a strategy cannot have this privacy, in words; None where it can, or shares nothing."""
        if self.mode == "none" or strategy.name == "local":
            return None
        known = _LOCAL if self.mode == "local" else _CENTRAL
        if strategy.name not in known:
            return f"privacy.mode: {self.mode} covers {', '.join(known)}, not all that {strategy.name} shares; use one of these"
        if self.mode == "local" or not isinstance(strategy, strategies.FedMergeRecipe):
            return None
        moved = {
            "start: warm groups clients": strategy.start == "warm",
            f"rule: {strategy.rule} weighs clients": strategy.rule in ("paper", "gradient"),
            "reseed_after moves clients": strategy.reseed_after is not None,
            "balance_rounds weighs clients": strategy.balance_rounds > 0,
        }
        for what, asked in moved.items():
            if asked:
                return f"strategy.{what} by each other's updates, which noise on the sums does not cover; use privacy.mode=local, or change it"
        return None

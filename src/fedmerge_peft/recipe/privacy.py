"""Section of client-level differential privacy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.section import Norm, Section
from fedmerge_peft.recipe.strategy_base import StrategyRecipe


class PrivacyRecipe(Section):
    """Client-level differential privacy over all rounds: of the updates (mode local), or of the
    adapters (mode central).
    """

    mode: Literal["none", "local", "central"] = "none"
    """local: each client clips its update and adds noise before sending it; the server is not
    trusted. central: each client clips its update, and the server adds noise to the sums that
    update the adapters; clients trust the server and its records, but not each other."""
    clip: Norm = 1.0
    """C, the L2 norm to which updates are clipped."""
    noise: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """z, the standard deviation of the noise in units of the sensitivity to one client (local: 2 C;
    central: docs/privacy.md). In a simulated run, the recipe's seed determines the noise, so that
    the run can be repeated. Anyone with the seed can subtract that noise. Across sites, the noise
    comes from the operating system's random number generator."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """δ of the reported (ε, δ). Choose less than 1 / (number of clients)."""

    def refusal(self, strategy: StrategyRecipe) -> str | None:
        """Return the reason why a strategy does not support this mode; None if it does."""
        if self.mode == "none" or not strategy.federated:
            return None
        if self.mode not in strategy.dp_modes:
            known = [
                name for name, kind in STRATEGIES.sections().items() if self.mode in kind.dp_modes
            ]
            return (
                f"privacy.mode: {self.mode} does not protect everything that {strategy.name} "
                f"shares; use one of the strategies {', '.join(known)}"
            )
        if strategy.private_head:
            return (
                f"privacy.mode: {self.mode} is not possible with head: private of the strategy "
                f"{strategy.name}, because clipping and noise would also change the private heads; "
                "use head: shared, or remove privacy"
            )
        return strategy.privacy_refusal(self.mode)

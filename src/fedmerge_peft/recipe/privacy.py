"""Client-level differential privacy: a section of the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.section import Section
from fedmerge_peft.recipe.strategies import StrategyRecipe


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

    def refusal(self, strategy: StrategyRecipe) -> str | None:
        """Why a strategy cannot have this privacy, in words; None where it can, or shares nothing."""
        if self.mode == "none" or not strategy.federated:
            return None
        if self.mode not in strategy.dp_modes:
            known = [
                name for name, kind in STRATEGIES.sections().items() if self.mode in kind.dp_modes
            ]
            return f"privacy.mode: {self.mode} covers {', '.join(known)}, not all that {strategy.name} shares; use one of these"
        return strategy.privacy_refusal(self.mode)

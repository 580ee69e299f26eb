"""Section of the LoRA adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedmerge_peft.recipe.patterns import pattern_fault
from fedmerge_peft.recipe.section import Boolean, Fraction, Rank, Section

Alpha = Annotated[float, Field(ge=1e-6, le=10_000)]


class LoraRecipe(Section):
    """The adapter: settings of PEFT's LoraConfig, and the way to merge adapters."""

    r: Rank = 8
    """Rank of the factors A and B."""
    alpha: Alpha = 16.0
    """Numerator of the scaling (PEFT's lora_alpha): the update of a weight is alpha / r · B A."""
    dropout: Fraction = 0.0
    """Probability of dropout on the adapter's input in training."""
    target_modules: list[str] | str | None = None
    """Module names, a regular expression, or all-linear. Default: PEFT's choice for the
    architecture; for a module from outside transformers, all linear layers except the head. If
    PEFT has no choice for a model of transformers, this key or `target_parameters` is required."""
    exclude_modules: list[str] | str | None = None
    """Modules without an adapter: module names, or a regular expression."""
    modules_to_save: list[str] | None = None
    """Modules that are trained in full, as part of the adapter. Tasks with a head, such as
    classification and regression, add it to this list."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Bias terms to train."""
    use_rslora: Boolean = False
    """Scale the update by alpha / sqrt(r) instead of alpha / r."""
    use_dora: Boolean = False
    """Weight-decomposed LoRA (DoRA). Merging averages the magnitudes, which is never exact."""
    init_lora_weights: bool | str = True
    """Initialization of the factors: true (A random, B zero) or gaussian (the same, with normally
    distributed A). Others are rejected."""
    rank_pattern: dict[str, Rank] = {}
    """Ranks that differ from r, by module name or regular expression."""
    alpha_pattern: dict[str, Alpha] = {}
    """Values that differ from alpha, by module name or regular expression."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the layers with an adapter. Default: all."""
    trainable_token_indices: Annotated[list[int], Field(min_length=1)] | None = None
    """Ids of the tokens whose embeddings are trained."""
    target_parameters: list[str] | None = None
    """Names of parameters (not modules) that get an adapter, for mixture-of-experts layers."""
    merge: Literal["factor", "shared_a"] = "factor"
    """factor: average A and B separately, as the paper averages parameters. shared_a: all adapters
    share a random, frozen A. Only the other parameters, such as B and the head, are trained and
    sent, and the average is exact."""

    @model_validator(mode="after")
    def _mergeable(self) -> LoraRecipe:
        if self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights!r} is not supported: merging requires "
                "unchanged pretrained weights, a random A, and B = 0 at the start; use true or "
                "gaussian"
            )
        if self.merge == "shared_a" and self.use_dora:
            raise ValueError(
                "merge: shared_a requires an exact merge, which use_dora rules out; "
                "choose one of them"
            )
        return self

    @model_validator(mode="after")
    def _layers_of_named_modules(self) -> LoraRecipe:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform: selects layers of modules that are listed by name, but "
                f"target_modules is {self.target_modules!r}; list names, such as [query, value], "
                "or remove one of the two keys"
            )
        return self

    @model_validator(mode="after")
    def _patterns_end(self) -> LoraRecipe:
        for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, field)
            for pattern in [value] if isinstance(value, str) else value or ():
                if isinstance(value, str | dict) and (fault := pattern_fault(pattern)):
                    raise ValueError(f"{field}: {fault}")
        return self

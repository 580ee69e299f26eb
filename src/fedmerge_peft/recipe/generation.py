"""Settings of generated text, for tasks whose models generate text."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedmerge_peft.recipe.section import Boolean, Count, Section

StopString = Annotated[str, Field(min_length=1, max_length=200)]


class GenerationSettings(Section):
    """Settings of generated text, with the names of transformers' GenerationConfig."""

    max_new_tokens: Count = 32
    """Maximum number of generated tokens in metrics of generated text, predictions and exports."""
    do_sample: Boolean = False
    """Draw each token at random instead of taking the most likely one. Metrics and predictions draw
    the same tokens each time."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of the sampling. Values below 1 favor likely tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to at least
    this value."""
    stop_strings: Annotated[list[StopString], Field(max_length=100)] = []
    """Texts that end the generation. The generated text ends before the first of them."""

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        for key in ("temperature", "top_p"):
            if not self.do_sample and getattr(self, key) != 1:
                raise ValueError(
                    f"{key}: has an effect on sampled tokens only; set do_sample: true, or remove "
                    f"{key}"
                )
        return self

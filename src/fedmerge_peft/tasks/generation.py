"""Text generation with a recipe's settings.

Of a model's generation config, only the special tokens are used, such as the end of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.tasks.base import Batch
from fedmerge_peft.util.seeds import derive, seeded

if TYPE_CHECKING:
    from fedmerge_peft.recipe.generation import GenerationSettings


def generation_options(settings: GenerationSettings) -> dict[str, Any]:
    """Return the values of ``GenerationConfig`` that a recipe sets.

    Beam search and the repetition penalty are switched off.
    """
    stop = {"stop_strings": settings.stop_strings} if settings.stop_strings else {}
    return {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0 if settings.do_sample else 50,  # without sampling, other values cause a warning
        "num_beams": 1,
        "repetition_penalty": 1.0,
        **stop,
    }


@dataclass(frozen=True)
class TextGenerator:
    """Generator of completions for tokenized prompts."""

    tokenizer: Any
    pad: int
    """Padding id."""
    settings: GenerationSettings
    keeps_prompt: bool = True
    """True if the model's output begins with the prompt; False if it begins with the start token of
    the decoder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further values of ``GenerationConfig``."""

    def complete(self, model: Any, prompts: Batch, seed: Sequence[int]) -> list[str]:
        """Complete prompts up to an end token, a stop string or ``max_new_tokens``.

        Args:
            model: Model in evaluation mode.
            prompts: ``input_ids`` and ``attention_mask``, ``(batch, longest)``, on the model's
                device.
            seed: Numbers from which the seed of sampling is derived.

        Returns:
            Completions without special tokens, stop strings and surrounding whitespace.

        Raises:
            BackboneError: The model does not generate text.
        """
        with seeded(derive(0, "generation", *seed), prompts["input_ids"].device):
            output = self._generate(model, prompts, **generation_options(self.settings))
        before = prompts["input_ids"].shape[1] if self.keeps_prompt else 1
        texts = self.tokenizer.batch_decode(
            output[:, before:],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [self._before_stop(text).strip() for text in texts]

    def stream(self, model: Any, prompt: Batch, on_text: Callable[[str], None]) -> str:
        """Complete one prompt, and pass the text to ``on_text`` while it is generated.

        Sampling uses torch's current random state.

        Args:
            model: Model in evaluation mode.
            prompt: ``input_ids`` and ``attention_mask``, ``(1, length)``, on the model's device.
            on_text: Called with each further part of the completion.

        Returns:
            The completion, which is all parts joined.

        Raises:
            BackboneError: The model does not generate text.
        """
        stream = _Stream(self, on_text)
        self._generate(model, prompt, streamer=stream, **generation_options(self.settings))
        return stream.text

    def first_logits(self, model: Any, prompts: Batch) -> Tensor:
        """Return the logits of the first two generated tokens, ``(batch, 2, vocabulary)``."""
        output = self._generate(
            model,
            prompts,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits, dim=1)

    @torch.no_grad()
    def _generate(self, model: Any, prompts: Batch, streamer: Any = None, **options: Any) -> Any:
        from transformers import GenerationConfig

        settings = GenerationConfig(
            **{**self.options, **options},
            use_cache=True,
            pad_token_id=self.pad,
            eos_token_id=end_tokens(self.tokenizer, model) or None,
        )
        with _only_special_tokens(model):
            return model.generate(
                **prompts, generation_config=settings, tokenizer=self.tokenizer, streamer=streamer
            )

    def _before_stop(self, text: str) -> str:
        """Return the text before the first stop string, or all of it without one."""
        places = (text.find(stop) for stop in self.settings.stop_strings)
        return text[: min((place for place in places if place >= 0), default=None)]


@contextmanager
def _only_special_tokens(model: Any) -> Iterator[None]:
    """Reduce a model's generation config to its special tokens, inside the context.

    transformers takes a value that a passed config does not set, such as ``no_repeat_ngram_size``,
    from the model's ``generation_config.json``.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    stored = inner.generation_config
    inner.generation_config = special_tokens(stored)
    try:
        yield
    finally:
        inner.generation_config = stored


def special_tokens(settings: Any) -> Any:
    """Return a ``GenerationConfig`` with nothing but the special tokens of ``settings``."""
    from transformers import GenerationConfig

    values = settings.to_dict()
    return GenerationConfig(**{key: values[key] for key in values if key.endswith("_token_id")})


class _Stream:
    """Streamer of ``model.generate`` that passes on text as soon as it can no longer change.

    It holds back text that may begin a stop string, whitespace that may be trailing, and incomplete
    characters.
    """

    def __init__(self, generator: TextGenerator, on_text: Callable[[str], None]) -> None:
        self._generator, self._on_text = generator, on_text
        self._ids: list[int] | None = None
        self.text = ""

    def put(self, ids: Tensor) -> None:
        """Skip the prompt in the first call; in later calls, add a token and pass on final text."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        longest = max(map(len, self._generator.settings.stop_strings), default=1)
        text = self._decoded()
        self._pass_on(text[: len(text) - longest + 1].rstrip().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Pass on the text that was held back."""
        self._pass_on(self._decoded())

    def _decoded(self) -> str:
        decoded = self._generator.tokenizer.decode(
            self._ids or [], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return self._generator._before_stop(decoded).strip()

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.text):
            self._on_text(text[len(self.text) :])
            self.text = text


def end_tokens(tokenizer: Any, model: Any) -> list[int]:
    """Return the ids of the tokenizer's and the model's end tokens, such as the end of a turn.

    Raises:
        BackboneError: The model does not generate text.
    """
    if (settings := getattr(model, "generation_config", None)) is None:
        raise BackboneError(
            "model: the model has no generation_config, so it does not generate text, and neither "
            "predictions nor metrics of generated text are possible; use perplexity or accuracy in "
            "task.metrics"
        )
    ids = settings.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})

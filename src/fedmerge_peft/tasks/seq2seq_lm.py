"""Sequence-to-sequence language modeling: a target text for each source text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.recipe.metrics import compares
from fedmerge_peft.tasks.base import Batch, Examples, Padding
from fedmerge_peft.tasks.generation import TextGenerator
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.shown import Segment, ShownExample
from fedmerge_peft.tasks.text_generation import (
    DEFAULT_LENGTH,
    IGNORED,
    TextGeneration,
    as_references,
    likely_tokens,
    token_losses,
)
from fedmerge_peft.tasks.token_task import TokenTask
from fedmerge_peft.tasks.tokenization import (
    pad,
    pad_tokens,
    ragged,
    read_texts,
    reject_empty,
    resolve_max_length,
    token_limit,
    truncated,
)
from fedmerge_peft.tasks.vocabulary import reject_unknown_ids

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.recipe.text_tasks import Seq2SeqLMRecipe


class Seq2SeqLMTask(TextGeneration, TokenTask):
    """Prediction of a target from a source, by models with an encoder and a decoder.

    The model itself creates the inputs of its decoder: it shifts the labels to the right.

    Args:
        recipe: Columns, prefix, lengths and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: A length exceeds the model's limit, or the tokenizer lacks a language.
        BackboneError: The tokenizer or the model's configuration cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    prompt_paddings: ClassVar[Sequence[Padding]] = ("right", "none", "alone")
    prompt_padding: Padding = "right"
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

base = AutoModelForSeq2SeqLM.from_pretrained({base}, {options})
tokenizer = AutoTokenizer.from_pretrained({processor})
{load}
"""
    labels = ()

    def __init__(
        self, recipe: Seq2SeqLMRecipe, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        config = self.prepare_tokens(recipe, backbone, model_folder)
        self.generates = compares(recipe.metrics, "texts")
        limit = token_limit(self.processor, config)
        self.max_source = resolve_max_length(
            recipe.max_source_length, limit, DEFAULT_LENGTH, "task.max_source_length"
        )
        resolve_max_length(recipe.max_target_length, limit, key="task.max_target_length")
        for attribute, key in (("src_lang", "source_language"), ("tgt_lang", "target_language")):
            if (code := getattr(recipe, key)) is not None:
                self._set_language(attribute, code, f"task.{key}")
        options = {}
        if recipe.target_language is not None:
            self._language = self.processor.convert_tokens_to_ids(recipe.target_language)
            options["forced_bos_token_id"] = self._language
        self._generator = TextGenerator(
            self.processor, self.pad_token_id, recipe, keeps_prompt=False, options=options
        )

    def _set_language(self, attribute: str, code: str, key: str) -> None:
        """Set a language of the tokenizer. ``key`` is the recipe's key, for error messages."""
        if not hasattr(self.processor, attribute):
            raise DataError(
                f"{key}: the tokenizer of {self._model} has no language codes; remove the key, or "
                "use a model with them (mBART, NLLB)"
            )
        if code not in self.processor.get_vocab():
            raise DataError(
                f"{key}: the tokenizer of {self._model} has no language {code!r}; use one of its "
                "codes, or remove the key"
            )
        setattr(self.processor, attribute, code)

    @classmethod
    def check_table(cls, recipe: Seq2SeqLMRecipe, table: Dataset) -> None:
        read_texts(table, recipe.source, "task.source")
        read_texts(table, recipe.target, "task.target")

    @classmethod
    def input_table(cls, recipe: Seq2SeqLMRecipe, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({recipe.source: inputs, recipe.target: inputs})

    def encode(self, table: Dataset) -> Examples:
        """Tokenize the targets, and the sources with the prefix.

        ``Examples.cuts`` lists rows with truncated or empty texts.

        Raises:
            DataError: A column does not exist, has nulls, or is not text; a text has no tokens, or
                tokens that the model does not have; the tokenizer reads a part of a text as a
                special token.
        """
        targets = read_texts(table, self.recipe.target, "task.target")
        examples = self.encode_prompts(read_texts(table, self.recipe.source, "task.source"))
        labels, long = truncated(
            self.processor,
            targets,
            max_length=self.recipe.max_target_length,
            call=lambda texts, **options: self.processor(text_target=texts, **options),
        )
        reject_empty(labels["input_ids"], targets, self.recipe.target)
        reject_unknown_ids(labels["input_ids"], self._vocabulary)
        references = as_references(targets) if self.generates else {}
        cut = f"have a target of more than {self.recipe.max_target_length} tokens, truncated"
        empty = [row for row, text in enumerate(targets) if not text.strip()]
        return Examples(
            {**examples.columns, "labels": ragged(labels["input_ids"]), **references},
            {**examples.cuts, cut: long, "have an empty target": empty},
        )

    def encode_prompts(self, prompts: Sequence[Any]) -> Examples:
        """Tokenize sources, with the prefix.

        Raises:
            DataError: A source is not a text; it has no tokens, or tokens that the model does not
                have; the tokenizer reads a part of it as a special token.
        """
        reject_inputs([prompt for prompt in prompts if not isinstance(prompt, str)], "a text")
        texts = [self.recipe.prefix + text for text in prompts]
        tokens, long = truncated(self.processor, texts, max_length=self.max_source)
        ids = tokens["input_ids"]
        reject_empty(ids, texts, self.recipe.source)
        self.check_ids(ids)
        columns = ragged(ids)
        return Examples(
            {"input_ids": columns, "prompt": columns},
            {
                f"have a source of more than {self.max_source} tokens, truncated": long,
                "have an empty source": [
                    row for row, text in enumerate(prompts) if not text.strip()
                ],
            },
        )

    def show(self, table: Dataset) -> list[ShownExample]:
        columns = self.encode(table).columns
        pairs = zip(columns["input_ids"], columns["labels"], strict=True)
        return [
            ShownExample(
                [
                    Segment.of(self.processor, "source", source),
                    Segment.of(self.processor, "target", target, has_loss=True),
                ]
            )
            for source, target in pairs
        ]

    def reads_end(self, model: Any) -> bool:
        return True

    def match_inputs(self, model: Any) -> None:
        """Check the tokenizer against the model.

        If the model has no start token for its decoder, set it to the target language's token.

        Raises:
            BackboneError: Tokenizer and model do not match; or the model has no start token, and
                the recipe has no target language.
        """
        super().match_inputs(model)
        if model.config.decoder_start_token_id is None and self.recipe.target_language is not None:
            model.config.decoder_start_token_id = self._language
            model.generation_config.decoder_start_token_id = self._language
        if model.config.decoder_start_token_id is None:
            raise BackboneError(
                f"backbone.model: {self._model} has no decoder_start_token_id in its configuration "
                "(config.json), so its decoder cannot begin; add it (T5: the id of the pad token), "
                "or set task.target_language for a model of many languages"
            )

    def probe(self) -> Examples:
        texts = ["a short text", "another text, which is longer than the first one"]
        ids = self.processor(texts)["input_ids"]
        columns = ragged([*ids, [*ids[1][-2::-1], ids[1][-1]]])
        return Examples({"input_ids": columns, "labels": columns, "prompt": columns})

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack examples.

        Returns:
            ``input_ids`` and ``attention_mask`` of the sources, ``(batch, longest source)``, and
            ``labels``, also as ``decoder_labels``, ``(batch, longest target)``.
        """
        rows = {
            name: [examples.columns[name][index] for index in indices]
            for name in ("input_ids", "labels")
        }
        side: Literal["left", "right"] = "left" if self.padding == "left" else "right"
        labels = pad(rows["labels"], IGNORED)
        batch = pad_tokens(rows["input_ids"], self.pad_token_id, side)
        return {**batch, "decoder_labels": labels, "labels": labels}

    def collate_prompts(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        sources = [examples.columns["prompt"][index] for index in indices]
        return pad_tokens(sources, self.pad_token_id, "right")

    def forward(self, model: Any, inputs: Batch) -> Tensor:
        """Return the logits of each target token, ``(batch, longest target, vocabulary)``.

        The model itself shifts the labels. The mean loss that it returns is not used.
        """
        sources = {name: value for name, value in inputs.items() if name != "decoder_labels"}
        logits: Tensor = model(**sources, labels=inputs["decoder_labels"]).logits
        return logits

    def own_outputs(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        inside = (batch["labels"] != IGNORED).to(logits.device)
        return [row[own] for row, own in zip(logits, inside, strict=True)]

    def prompt_logits(self, model: Any, prompts: Batch) -> Tensor:
        start = model.config.decoder_start_token_id
        decoder = prompts["input_ids"].new_full((len(prompts["input_ids"]), 1), start)
        logits: Tensor = model(**prompts, decoder_input_ids=decoder).logits
        return logits[:, -1]

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``-log softmax(logits[t])[label[t]]`` over the tokens t of a target.

        Args:
            logits: ``(batch, length, vocabulary)``.
            labels: ``(batch, length)``; -100 marks padding.

        Returns:
            Sum in nats and number of tokens, both float32 ``(batch,)``.
        """
        return token_losses(logits, labels)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return the most likely token and the label at each target position.

        Return an empty mapping if ``accuracy`` is not one of the metrics.
        """
        if "accuracy" not in self.metrics:
            return {}
        return likely_tokens(logits, labels)

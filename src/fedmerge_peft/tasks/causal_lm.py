"""Causal language modeling, with loss on complete texts or on completions only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.recipe.tasks import compares_texts
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.tasks.text_formats import infer_format, parse_template, read_row_texts
from fedmerge_peft.tasks.tokenization import (
    chunks,
    get_pad_token_id,
    load_tokenizer,
    pad,
    pipeline_tokenizer,
    ragged,
    resolve_max_length,
    token_limit,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import BackboneRecipe
    from fedmerge_peft.recipe.tasks import CausalLMRecipe

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024
"""Maximum length in tokens if the recipe has no ``max_length`` and the model's limit is larger."""
IGNORED = -100
"""Label of a position without loss."""


class CausalLMTask(Task):
    """Next-token prediction on texts, chats, or prompts with completions.

    Args:
        recipe: Format, columns, lengths and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation, from whose columns the format is inferred.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: The columns match no format, or a length exceeds the model's limit.
        RecipeError: A metric of generated text is set, but the data have no completions.
        BackboneError: The tokenizer or the model's configuration cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    completes: ClassVar[bool] = True
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, {options})
tokenizer = AutoTokenizer.from_pretrained({processor})
{load}
"""
    labels = ()

    def __init__(
        self, recipe: CausalLMRecipe, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        self.recipe = recipe
        self.metrics = recipe.metrics
        self.format = infer_format(recipe, table)
        generative = [name for name in recipe.metrics if compares_texts(name)]
        self.generates = bool(generative)
        if generative and self.format == "text":
            raise RecipeError(
                [
                    f"task.metrics: {generative[0]} compares generated completions with "
                    "references, but plain text has no prompts; use perplexity or accuracy, or "
                    "data with prompts"
                ]
            )
        if self.format == "instruction":
            parse_template(recipe.template)
        self.processor, config = load_tokenizer(backbone, model_folder)
        self.pad_token_id = get_pad_token_id(self.processor)
        limit = token_limit(self.processor, config)
        self.max_length = (
            resolve_max_length(recipe.max_length, limit, DEFAULT_LENGTH) or DEFAULT_LENGTH
        )
        self.max_prompt = min(self.max_length, (limit or 2**31) - recipe.max_new_tokens)
        if self.generates and self.max_prompt < 1:
            raise DataError(
                f"task.max_new_tokens: {recipe.max_new_tokens} new tokens leave no room for a "
                f"prompt; the model's limit is {limit} tokens"
            )
        eos = self.processor.eos_token_id
        self._adds_eos = eos is not None and self.processor("a")["input_ids"][-1:] == [eos]

    # ----------------------------------------------------------------------------------------------
    # Rows to tensors
    # ----------------------------------------------------------------------------------------------
    @classmethod
    def probe_inputs(cls, recipe: CausalLMRecipe) -> list[Any]:
        return ["a", "another text, which is longer"]

    @classmethod
    def input_table(cls, recipe: CausalLMRecipe, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({recipe.prompt: inputs, recipe.completion: inputs})

    @classmethod
    def pipeline_options(
        cls, recipe: CausalLMRecipe, backbone: BackboneRecipe, folder: str
    ) -> dict[str, Any]:
        tokenizer = pipeline_tokenizer(backbone, folder, recipe.max_length)
        tokenizer.padding_side = "left"
        return {"tokenizer": tokenizer, "max_new_tokens": recipe.max_new_tokens}

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row.

        An end-of-sequence token is appended to texts and completions. The end of a chat follows its
        template. Long texts and chats are truncated on the right. Long prompts are truncated on the
        left, after their begin-of-sequence token, so completions are kept. If a prompt's tokens are
        not a prefix of the tokens of prompt + completion, both are tokenized separately.
        Warnings count truncated and separately tokenized rows.

        Raises:
            DataError: A column does not exist, has the wrong type, or has nulls; a row has no token
                to predict.
        """
        texts = read_row_texts(
            self.recipe, self.format, table, self.processor, final_turns=self.generates
        )
        rows: list[tuple[list[int], list[int]]]
        if texts.prompts is None:
            rows = [
                ([], ids)
                for ids in self._tokenize(
                    texts.targets, special=self.format == "text", end=self.format == "text"
                )
            ]
        else:
            rows = self._tokenize_pairs(texts.prompts, texts.targets)
        length = self.max_length
        if truncated := sum(len(prompt) + len(target) > length for prompt, target in rows):
            logger.warning(
                "%d of %d examples are longer than %d tokens and were truncated",
                truncated,
                len(rows),
                length,
            )
        inputs, labels = [], []
        for row, (prompt, target) in enumerate(rows):
            # Prediction of the first token of a completion needs one token before it.
            context = self._truncate_left(prompt, max(length - len(target), min(1, len(prompt))))
            target = target[: length - len(context)]
            inputs.append(context + target)
            labels.append([IGNORED] * len(context) + target)
            # The first token is not predicted. Without its label, labels count the loss terms.
            labels[row][:1] = [IGNORED]
            if all(label == IGNORED for label in labels[row]):
                raise DataError(
                    f"row {row} (of the rows in use): {len(inputs[row])} token(s) leave nothing to "
                    f"predict: {texts.targets[row][:80]!r}"
                )
        columns = {"input_ids": ragged(inputs), "labels": ragged(labels)}
        if self.generates:
            prompts, references = [prompt for prompt, _ in rows], texts.targets
            if texts.final_turns is not None:
                prompts, references = (
                    self._tokenize([prompt for prompt, _ in texts.final_turns], special=False),
                    [text for _, text in texts.final_turns],
                )
            columns["prompt"] = ragged(
                [self._truncate_left(ids, self.max_prompt) for ids in prompts]
            )
            columns["reference"] = ragged([text.encode() for text in references])
        return Examples(columns)

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, longest)``.

        Rows are padded on the right.
        """
        inputs = [examples.columns["input_ids"][index] for index in indices]
        return {
            "input_ids": pad(inputs, self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in inputs], 0),
            "labels": pad([examples.columns["labels"][index] for index in indices], IGNORED),
        }

    def _tokenize(
        self, texts: Sequence[str], *, special: bool = True, end: bool = False
    ) -> list[list[int]]:
        """Tokenize texts.

        Args:
            texts: Texts.
            special: Add the tokenizer's initial special tokens.
            end: Append the end-of-sequence token.
        """
        eos = self.processor.eos_token_id
        rows: list[list[int]] = []
        for (chunk,) in chunks(texts):
            for ids in self.processor(list(chunk), add_special_tokens=special, verbose=False)[
                "input_ids"
            ]:
                tokens = ids[:-1] if special and self._adds_eos else ids
                rows.append([*tokens, eos] if end and eos is not None else list(tokens))
        return rows

    def _tokenize_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenize prompts.

        An empty prompt is replaced by the begin-of-sequence token, because the model predicts the
        first token of a completion from the token before it.
        """
        bos = self.processor.bos_token_id
        rows = [ids or ([] if bos is None else [bos]) for ids in self._tokenize(prompts)]
        empty = next((row for row, ids in enumerate(rows) if not ids), None)
        if empty is not None:
            raise DataError(
                f"row {empty} (of the rows in use): the prompt is empty, and the tokenizer has no "
                "begin-of-sequence token to replace it; fill in the prompt, or remove the row"
            )
        return rows

    def _tokenize_pairs(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Tokenize prompts and their completions, which end with the end-of-sequence token."""
        starts = self._tokenize_prompts(prompts)
        joined = self._tokenize(
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            end=True,
        )
        # An empty prompt was replaced by a begin-of-sequence token, which not all tokenizers add to
        # prompt + completion.
        mismatched = [
            row
            for row, start in enumerate(starts)
            if prompts[row] and joined[row][: len(start)] != start
        ]
        separate = sorted({*mismatched, *(row for row, prompt in enumerate(prompts) if not prompt)})
        alone = dict(
            zip(
                separate,
                self._tokenize([completions[row] for row in separate], special=False, end=True),
                strict=True,
            )
        )
        if mismatched:
            logger.warning(
                "in %d of %d rows the prompt's tokens are not a prefix of the tokens of prompt + "
                "completion (first: row %d); both were tokenized separately. Often the prompt ends "
                "with a space that belongs to the completion",
                len(mismatched),
                len(starts),
                mismatched[0],
            )
        return [
            (start, alone[row] if row in alone else joined[row][len(start) :])
            for row, start in enumerate(starts)
        ]

    def _truncate_left(self, prompt: list[int], length: int) -> list[int]:
        """Truncate a prompt on the left to ``length`` tokens; keep a begin-of-sequence token."""
        if len(prompt) <= length:
            return prompt
        if length > 0 and prompt[0] == self.processor.bos_token_id:
            return [prompt[0], *prompt[len(prompt) - length + 1 :]]
        return prompt[len(prompt) - length :]

    # ----------------------------------------------------------------------------------------------
    # Logits to numbers
    # ----------------------------------------------------------------------------------------------
    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``-log softmax(logits[t - 1])[label[t]]`` over the labeled tokens t of an example.

        Args:
            logits: ``(batch, length, vocabulary)``.
            labels: ``(batch, length)``, not shifted; -100 marks positions without loss.

        Returns:
            Sum in nats and number of labeled tokens, both float32 ``(batch,)``.
        """
        targets = labels[:, 1:]
        losses = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view_as(targets)
        return losses.sum(dim=1), (targets != IGNORED).sum(dim=1).float()

    def predict(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token and the label at each labeled position, both flat.

        The tensors are empty if no metric needs them.
        """
        if "accuracy" not in self.metrics:
            return labels.new_empty(0), labels.new_empty(0)
        targets = labels[:, 1:]
        return logits[:, :-1].argmax(dim=-1)[targets != IGNORED], targets[targets != IGNORED]

    def encode_prompts(self, prompts: Sequence[str]) -> Examples:
        """Tokenize prompts for ``complete``. Long prompts are truncated on the left.

        Raises:
            DataError: A prompt is empty, and the tokenizer has no begin-of-sequence token.
        """
        return Examples(
            {
                "prompt": ragged(
                    [
                        self._truncate_left(ids, self.max_prompt)
                        for ids in self._tokenize_prompts(prompts)
                    ]
                )
            }
        )

    def collate_prompts(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Return ``input_ids`` and ``attention_mask``, ``(batch, longest)``, padded on the left."""
        prompts = [examples.columns["prompt"][index] for index in indices]
        return {
            "input_ids": pad(prompts, self.pad_token_id, "left"),
            "attention_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        }

    @torch.no_grad()
    def complete(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> list[str]:
        """Complete prompts greedily, up to an end-of-sequence token or ``max_new_tokens``.

        Args:
            model: Model in evaluation mode.
            examples: Output of ``encode`` or ``encode_prompts``.
            indices: Indices of the prompts in ``examples``.
            device: Device of the model.

        Returns:
            Completions without surrounding whitespace.
        """
        from transformers import GenerationConfig

        batch = {
            name: tensor.to(device)
            for name, tensor in self.collate_prompts(examples, indices).items()
        }
        # These override the sampling settings of the model's generation_config.json.
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            use_cache=True,
            max_new_tokens=self.recipe.max_new_tokens,
            pad_token_id=self.pad_token_id,
            eos_token_id=self._end_token_ids(model) or None,
        )
        tokens = model.generate(**batch, generation_config=settings)[
            :, batch["input_ids"].shape[1] :
        ]
        texts = self.processor.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text.strip() for text in texts]

    def generate(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> tuple[list[str], list[str]]:
        """Return completions and references, without surrounding whitespace."""
        references = [
            bytes(examples.columns["reference"][index].tolist()).decode() for index in indices
        ]
        return self.complete(model, examples, indices, device), [
            text.strip() for text in references
        ]

    def _end_token_ids(self, model: Any) -> list[int]:
        """Return the end tokens of the tokenizer and the model, such as the end of a turn."""
        ids = model.generation_config.eos_token_id
        return sorted(
            {*(ids if isinstance(ids, list) else [ids]), self.processor.eos_token_id} - {None}
        )

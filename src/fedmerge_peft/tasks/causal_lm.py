"""Next-token prediction, with the loss on all of a text or on a completion alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.tasks.metrics import GENERATED
from fedmerge_peft.tasks.text_formats import infer_format, parse_template, read_row_texts
from fedmerge_peft.tasks.tokenization import (
    chunks,
    get_pad_token_id,
    load_tokenizer,
    pad,
    ragged,
    resolve_max_length,
    token_limit,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import BackboneRecipe, CausalLMRecipe

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 1024
"""Longest example in tokens where the recipe names none and the model takes more."""
IGNORED = -100
"""Label of a position that has no loss."""


class CausalLMTask(Task):
    """Text, chats, or prompts with completions, to next-token predictions.

    Args:
        recipe: Format, columns, lengths and metrics.
        backbone: Where the tokenizer is.
        table: All rows of the federation, whose columns tell the format.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: Where no format fits the columns, or a length the model.
        RecipeError: For metrics of generated text where there is no completion to compare with.
        BackboneError: Where the tokenizer or the model's configuration cannot be loaded.
    """

    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    labels = ()

    def __init__(
        self, recipe: CausalLMRecipe, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        self.recipe = recipe
        self.metrics = recipe.metrics
        self.format = infer_format(recipe, table)
        compared = [name for name in recipe.metrics if name in GENERATED]
        self.generates = bool(compared)
        if compared and self.format == "text":
            raise RecipeError(
                [f"task.metrics: {compared[0]} compares a generated completion with the wanted one, and plain text has no prompt to "
                 "complete; use perplexity or accuracy, or data with prompts"]
            )  # fmt: skip
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
                f"task.max_new_tokens: {recipe.max_new_tokens} new tokens leave no room for a prompt; the model takes {limit}"
            )
        eos = self.processor.eos_token_id
        self._adds_eos = eos is not None and self.processor("a")["input_ids"][-1:] == [eos]

    # ----------------------------------------------------------------------------------------------
    # Rows to tensors
    # ----------------------------------------------------------------------------------------------
    def encode(self, table: Dataset) -> Examples:
        """Tokenise every row; an end-of-sequence token follows each text and completion (a chat ends as its template says).

        Too long examples are cut: texts and chats on the right; of a prompt with a completion, the prompt on the left (its
        begin-of-sequence token stays), so that the completion survives. Warnings count them, and the rows where the prompt's
        tokens do not begin those of prompt + completion; there, both are tokenised apart.

        Raises:
            DataError: For absent or unfit columns, nulls, and rows that leave no token to predict.
        """
        texts = read_row_texts(
            self.recipe, self.format, table, self.processor, answers=self.generates
        )
        rows: list[tuple[list[int], list[int]]]
        if texts.prompts is None:
            rows = [
                ([], ids)
                for ids in self._tokenize(
                    texts.learned, special=self.format == "text", end=self.format == "text"
                )
            ]
        else:
            rows = self._tokenize_pairs(texts.prompts, texts.learned)
        length = self.max_length
        if cut := sum(len(prompt) + len(learned) > length for prompt, learned in rows):
            logger.warning(
                "%d of %d examples are longer than %d tokens and were cut", cut, len(rows), length
            )
        inputs, labels = [], []
        for row, (prompt, learned) in enumerate(rows):
            # A completion that fills the whole length still needs one token before it, to be predicted from.
            kept = self._cut_left(prompt, max(length - len(learned), min(1, len(prompt))))
            learned = learned[: length - len(kept)]
            inputs.append(kept + learned)
            labels.append([IGNORED] * len(kept) + learned)
            labels[row][:1] = [
                IGNORED
            ]  # nothing precedes the first token; now the labels count the terms of the loss
            if all(label == IGNORED for label in labels[row]):
                raise DataError(
                    f"row {row} in use: {len(inputs[row])} token(s) leave nothing to predict: {texts.learned[row][:80]!r}"
                )
        columns = {"input_ids": ragged(inputs), "labels": ragged(labels)}
        if self.generates:
            starts, wanted = [prompt for prompt, _ in rows], texts.learned
            if texts.answers is not None:
                starts, wanted = (
                    self._tokenize([prompt for prompt, _ in texts.answers], special=False),
                    [text for _, text in texts.answers],
                )
            columns["prompt"] = ragged([self._cut_left(ids, self.max_prompt) for ids in starts])
            columns["reference"] = ragged([text.encode() for text in wanted])
        return Examples(columns)

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels``, all ``(batch, longest)``, padded on the right."""
        inputs = [examples.columns["input_ids"][index] for index in indices]
        return {
            "input_ids": pad(inputs, self.pad_token_id),
            "attention_mask": pad([torch.ones_like(ids) for ids in inputs], 0),
            "labels": pad([examples.columns["labels"][index] for index in indices], IGNORED),
        }

    def _tokenize(
        self, texts: Sequence[str], *, special: bool = True, end: bool = False
    ) -> list[list[int]]:
        """Token ids of each text: with what the tokenizer puts in front where ``special``, with an EOS after it where ``end``."""
        eos = self.processor.eos_token_id
        rows: list[list[int]] = []
        for (chunk,) in chunks(texts):
            for ids in self.processor(list(chunk), add_special_tokens=special, verbose=False)[
                "input_ids"
            ]:
                bare = ids[:-1] if special and self._adds_eos else ids
                rows.append([*bare, eos] if end and eos is not None else list(bare))
        return rows

    def _tokenize_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt; an empty one is the begin-of-sequence token, so that a completion has something to follow."""
        bos = self.processor.bos_token_id
        rows = [ids or ([] if bos is None else [bos]) for ids in self._tokenize(prompts)]
        empty = next((row for row, ids in enumerate(rows) if not ids), None)
        if empty is not None:
            raise DataError(
                f"row {empty} in use: the prompt is empty, and the tokenizer has no begin-of-sequence token to stand for it"
            )
        return rows

    def _tokenize_pairs(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of each prompt and of the completion that follows it, with EOS."""
        starts = self._tokenize_prompts(prompts)
        wholes = self._tokenize(
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            end=True,
        )
        # An empty prompt has a stand-in that the whole lacks where the tokenizer adds no begin-of-sequence token itself.
        clash = [
            row
            for row, start in enumerate(starts)
            if prompts[row] and wholes[row][: len(start)] != start
        ]
        apart = sorted({*clash, *(row for row, prompt in enumerate(prompts) if not prompt)})
        alone = dict(
            zip(
                apart,
                self._tokenize([completions[row] for row in apart], special=False, end=True),
                strict=True,
            )
        )
        if clash:
            logger.warning(
                "in %d of %d rows the tokens of prompt + completion do not begin with the prompt's (first: row %d); both were tokenised "
                "apart. Often the prompt ends in a space that belongs to the completion",
                len(clash), len(starts), clash[0],
            )  # fmt: skip
        return [
            (start, alone[row] if row in alone else wholes[row][len(start) :])
            for row, start in enumerate(starts)
        ]

    def _cut_left(self, prompt: list[int], length: int) -> list[int]:
        """The last ``length`` tokens, of which the first stays the begin-of-sequence token where the prompt has it."""
        if len(prompt) <= length:
            return prompt
        if length > 0 and prompt[0] == self.processor.bos_token_id:
            return [prompt[0], *prompt[len(prompt) - length + 1 :]]
        return prompt[len(prompt) - length :]

    # ----------------------------------------------------------------------------------------------
    # Logits to numbers
    # ----------------------------------------------------------------------------------------------
    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over an example's labelled tokens t of ``-log softmax(logits[t - 1])[label[t]]``, and how many there are.

        Args:
            logits: ``(batch, length, vocabulary)``.
            labels: ``(batch, length)``, -100 where there is no loss; they are shifted here, not by the caller.
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
        """The likeliest token and the label at each labelled position, both flat; empty where no metric looks at them."""
        if "accuracy" not in self.metrics:
            return labels.new_empty(0), labels.new_empty(0)
        targets = labels[:, 1:]
        return logits[:, :-1].argmax(dim=-1)[targets != IGNORED], targets[targets != IGNORED]

    def encode_prompts(self, prompts: Sequence[str]) -> Examples:
        """Prompts without completions, as ``complete`` takes them; long ones are cut on the left. Raises ``DataError`` for an empty one."""
        return Examples(
            {
                "prompt": ragged(
                    [
                        self._cut_left(ids, self.max_prompt)
                        for ids in self._tokenize_prompts(prompts)
                    ]
                )
            }
        )

    def collate_prompts(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """``input_ids`` and ``attention_mask``, both ``(batch, longest)``, padded on the left."""
        prompts = [examples.columns["prompt"][index] for index in indices]
        return {
            "input_ids": pad(prompts, self.pad_token_id, "left"),
            "attention_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        }

    @torch.no_grad()
    def complete(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> list[str]:
        """Greedy completions of the prompts, up to the end of sequence or ``max_new_tokens``, stripped.

        The model should be in evaluation mode.
        """
        from transformers import GenerationConfig

        batch = {
            name: tensor.to(device)
            for name, tensor in self.collate_prompts(examples, indices).items()
        }
        # Every field that the model's own generation_config.json may set for sampling is set here, so that decoding is plainly greedy.
        settings = GenerationConfig(
            do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, use_cache=True,
            max_new_tokens=self.recipe.max_new_tokens, pad_token_id=self.pad_token_id, eos_token_id=self._end_token_ids(model) or None,
        )  # fmt: skip
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
        """What ``complete`` gives, and the wanted completions, stripped too."""
        wanted = [
            bytes(examples.columns["reference"][index].tolist()).decode() for index in indices
        ]
        return self.complete(model, examples, indices, device), [text.strip() for text in wanted]

    def _end_token_ids(self, model: Any) -> list[int]:
        """Token ids that end a completion: the tokenizer's, and those that the model names, such as the end of a turn."""
        named = model.generation_config.eos_token_id
        return sorted(
            {*(named if isinstance(named, list) else [named]), self.processor.eos_token_id} - {None}
        )

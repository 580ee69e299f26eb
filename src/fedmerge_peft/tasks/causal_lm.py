"""Causal language modeling, with loss on complete texts, completions or assistant turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.recipe.metrics import compares
from fedmerge_peft.tasks.base import Batch, Examples
from fedmerge_peft.tasks.chat_messages import parse_prompt, read_chats
from fedmerge_peft.tasks.chat_template import set_chat_template, set_template
from fedmerge_peft.tasks.chat_tokens import ChatTokens, Row
from fedmerge_peft.tasks.generation import TextGenerator, generation_options
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.row_names import row_name, rows_are_inputs
from fedmerge_peft.tasks.shown import ShownExample, split_into_segments
from fedmerge_peft.tasks.text_formats import (
    check_columns,
    infer_format,
    infer_loss,
    parse_template,
    read_pairs,
)
from fedmerge_peft.tasks.text_generation import (
    DEFAULT_LENGTH,
    IGNORED,
    TextGeneration,
    as_references,
    likely_tokens,
    token_losses,
)
from fedmerge_peft.tasks.text_tokens import TextTokens
from fedmerge_peft.tasks.token_task import TokenTask
from fedmerge_peft.tasks.tokenization import (
    pad,
    pad_tokens,
    ragged,
    read_texts,
    resolve_max_length,
    token_limit,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.recipe.tasks import CausalLMRecipe


class CausalLMTask(TextGeneration, TokenTask):
    """Next-token prediction on texts, chats, or prompts with completions.

    Args:
        recipe: Format, columns, lengths and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation. Their columns determine the format, unless the recipe
            names it.
        model_folder: Local folder or hub id of the model.

    Raises:
        DataError: The columns do not match the recipe's format or, without one, any format; a
            length exceeds the model's limit; the braces of ``template`` do not match; or
            ``chat_template`` is a name that none of the tokenizer's templates has.
        RecipeError: The metrics need generated text, but the data have no prompts; or ``loss`` does
            not match the format of the data.
        BackboneError: The tokenizer or the model's configuration cannot be loaded; or the tokenizer
            has an invalid length limit, or neither a pad nor an end-of-sequence token.
    """

    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    splits_special: ClassVar[bool] = False  # ``task.special_tokens`` decides
    loading_code: ClassVar[str] = """{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, {options})
{load}
tokenizer = AutoTokenizer.from_pretrained({processor})
"""
    labels = ()

    def __init__(
        self, recipe: CausalLMRecipe, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        self.format: str = infer_format(recipe, table)
        generative = [name for name in recipe.metrics if compares([name], "texts")]
        self.generates = bool(generative)
        if generative and self.format == "text":
            raise RecipeError(
                f"task.metrics: {generative[0]} compares generated completions with "
                "references, but plain text has no prompts; use perplexity or accuracy, or "
                "data with prompts"
            )
        if self.format == "instruction":
            parse_template(recipe.template)
        config = self.prepare_tokens(recipe, backbone, model_folder)
        limit = token_limit(self.processor, config)
        self.max_length = (
            resolve_max_length(recipe.max_length, limit, DEFAULT_LENGTH) or DEFAULT_LENGTH
        )
        self.max_prompt = min(self.max_length, (limit or 2**31) - recipe.max_new_tokens)
        if self.generates and self.max_prompt < 1:
            raise DataError(
                f"task.max_new_tokens: {recipe.max_new_tokens} new tokens leave no room for a "
                f"prompt; the model's limit is {limit} tokens; lower task.max_new_tokens"
            )
        set_template(self.processor, recipe)
        self._generator = TextGenerator(self.processor, self.pad_token_id, recipe)
        self.loss = infer_loss(recipe, self.format, table)
        # Chat templates write special tokens, which must be read as tokens.
        reading = "tokens" if self.format == "messages" else recipe.special_tokens
        self._tokens = TextTokens(self.processor, reading)
        self._chats = ChatTokens(self.processor)

    # ---- Rows to tensors -------------------------------------------------------------------------
    @classmethod
    def check_table(cls, recipe: CausalLMRecipe, table: Dataset) -> None:
        check_columns(recipe, table)

    @classmethod
    def format_in(cls, recipe: CausalLMRecipe, table: Dataset) -> str | None:
        return infer_format(recipe, table)

    @classmethod
    def input_table(cls, recipe: CausalLMRecipe, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({recipe.prompt: inputs, recipe.completion: inputs})

    @classmethod
    def pipeline_options(cls, recipe: Any, backbone: BackboneRecipe, folder: str) -> dict[str, Any]:
        tokenizer = super().pipeline_options(recipe, backbone, folder)["tokenizer"]
        tokenizer.padding_side = "left"
        tokenizer.split_special_tokens = recipe.special_tokens == "text"
        set_chat_template(tokenizer, recipe)
        options = generation_options(recipe)
        if stop := options.pop("stop_strings", None):
            options["stop_sequence"] = stop
        return {"tokenizer": tokenizer, **options}

    def encode(self, table: Dataset) -> Examples:
        """Tokenize every row.

        The tokenizer's end-of-sequence token, if any, is appended to texts and completions. The
        chat template determines the end of a chat. If a prompt's tokens are not a prefix of the
        tokens of prompt + completion, both are tokenized separately; a warning states the number of
        such rows. ``Examples.cuts`` lists rows that are truncated, or whose prompts are truncated
        for generation, and rows that have no text to learn.

        Raises:
            DataError: A column does not exist, has the wrong type, or has nulls; a text contains a
                special token that is refused (``TextTokens.reject_special``); a prompt is empty
                (``TextTokens.prompts``); a chat is invalid, or cannot be rendered
                (``ChatTokens.rows``); a chat does not end with the assistant's message, but a
                metric needs generated text; a token has no embedding; a row has no token to
                predict.
        """
        generation = Examples({})
        if self.format == "messages":
            chats = read_chats(self.recipe, table)
            rows = self._chats.rows(chats, self.loss)
            if self.generates:
                generation = self._references(*self._chats.final_turns(chats))
        else:
            rows, prompts, references = self._text_rows(table)
            if self.generates:
                generation = self._references(prompts, references)
        inputs, labels = [], []
        length = self.max_length
        long = [row for row, (ids, _) in enumerate(rows) if len(ids) > length]
        unlearned: list[int] = []
        blank: list[int] = []
        no_text = {IGNORED, *self.processor.all_special_ids}
        for row, example in enumerate(rows):
            ids, labeled = example
            kept = self._kept(example)
            inputs.append([ids[place] for place in kept])
            labels.append([ids[place] if labeled[place] else IGNORED for place in kept])
            if self.loss != "all" and sum(labeled[place] for place in kept) < sum(labeled):
                unlearned.append(row)
            # No token precedes and predicts the first one. Its label is removed, so that the
            # number of labels is the number of loss terms.
            labels[row][:1] = [IGNORED]
            if all(label == IGNORED for label in labels[row]):
                cut = len(ids) > length and any(labeled[1:])
                remedy = "raise task.max_length" if cut else "correct or remove the row"
                tokens = "1 token leaves" if len(kept) == 1 else f"{len(kept)} tokens leave"
                raise DataError(
                    f"{row_name(row)}: with task.loss: "
                    f"{self.loss}, {tokens} nothing to predict: "
                    f"{self.processor.decode(ids)[:80]!r}; {remedy}"
                )
            if no_text.issuperset(labels[row]):
                blank.append(row)
        self.check_ids(inputs)
        columns = {"input_ids": ragged(inputs), "labels": ragged(labels)}
        cuts = {
            f"are longer than {length} tokens and were truncated": long,
            f"were truncated to {length} tokens, and removed tokens have a loss": unlearned,
            "have no text to learn, only special tokens": blank,
        }
        return Examples({**columns, **generation.columns}, {**cuts, **generation.cuts})

    def show(self, table: Dataset) -> list[ShownExample]:
        if self.format == "messages":
            chats = read_chats(self.recipe, table)
            rows = self._chats.rows(chats, self.loss)
            roles = self._chats.roles(chats, rows)
        else:
            rows, _, _ = self._text_rows(table)
            names = ("text", "text") if self.loss == "all" else ("prompt", "completion")
            roles = [[names[has_loss] for has_loss in labeled] for _, labeled in rows]
        return [
            ShownExample(
                split_into_segments(self.processor, row[0], roles_of, row[1], self._kept(row))
            )
            for row, roles_of in zip(rows, roles, strict=True)
        ]

    def _kept(self, row: Row) -> list[int]:
        return self._tokens.kept(*row, self.max_length, whole=self.loss == "completion")

    def _text_rows(self, table: Dataset) -> tuple[list[Row], list[list[int]], Sequence[str]]:
        """Return examples, the tokens of prompts, and completions; no prompts for plain texts."""
        if self.format == "text":
            texts = read_texts(table, self.recipe.text, "task.text")
            self._tokens.reject_special(texts)
            rows = self._tokens.rows(texts, end=True)
            return [(ids, [True] * len(ids)) for ids in rows], [], []
        prompts, completions = read_pairs(self.recipe, self.format, table)
        self._tokens.reject_special(prompts)
        self._tokens.reject_special(completions)
        pairs = self._tokens.pairs(prompts, completions)
        of_prompt = self.loss == "all"
        return (
            [
                (prompt + target, [of_prompt] * len(prompt) + [True] * len(target))
                for prompt, target in pairs
            ],
            [prompt for prompt, _ in pairs],
            completions,
        )

    def _references(self, prompts: Sequence[list[int]], references: Sequence[str]) -> Examples:
        examples = self._prompts(prompts)
        return Examples({**examples.columns, **as_references(references)}, examples.cuts)

    def _prompts(self, prompts: Sequence[list[int]]) -> Examples:
        """Truncate prompts on the left, for generation; ``cuts`` lists the truncated prompts."""
        length = self.max_prompt
        cut = [row for row, ids in enumerate(prompts) if len(ids) > length]
        return Examples(
            {"prompt": ragged([self._tokens.truncate_left(ids, length) for ids in prompts])},
            {f"have a prompt of more than {length} tokens, cut on the left for generation": cut},
        )

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, ``(batch, longest)``."""
        inputs = [examples.columns["input_ids"][index] for index in indices]
        labels = [examples.columns["labels"][index] for index in indices]
        side: Literal["left", "right"] = "left" if self.padding == "left" else "right"
        batch = pad_tokens(inputs, self.pad_token_id, side)
        return {**batch, "labels": pad(labels, IGNORED, side)}

    def probe(self) -> Examples:
        texts = ["a short text", "another text, which is longer than the first one"]
        ids = [row[: self.max_prompt] for row in self._tokens.rows(texts)]
        columns = ragged([*ids, [*ids[1][:1], *ids[1][:0:-1]]])
        return Examples({"input_ids": columns, "labels": columns, "prompt": columns})

    def token_targets(self, labels: Tensor) -> Tensor:
        """Return the label of the token after each position, ``(batch, length)``."""
        return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``-log softmax(logits[t - 1])[label[t]]`` over the labeled tokens t of each example.

        Args:
            logits: Logits at all positions, ``(batch, length, vocabulary)``; or only at the n
                positions with a target (``token_targets``), ``(n, vocabulary)``; or the
                cross-entropies at these n positions, ``(n,)``.
            labels: ``(batch, length)``, not shifted; -100 marks positions without loss.

        Returns:
            Sum in nats and number of labeled tokens, both float32 ``(batch,)``.
        """
        return token_losses(_before_last(logits), labels[:, 1:])

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return the most likely token and the label at each labeled position.

        Return an empty mapping if ``accuracy`` is not one of the metrics.
        """
        if "accuracy" not in self.metrics:
            return {}
        return likely_tokens(_before_last(logits), labels[:, 1:])

    def encode_prompts(self, prompts: Sequence[Any]) -> Examples:
        """Tokenize prompts for ``complete``. Long prompts are truncated on the left.

        Args:
            prompts: Texts as in training, or lists of messages, which the chat template formats.

        Raises:
            DataError: A prompt is neither text nor messages; a text has no tokens, and the
                tokenizer has no begin-of-sequence token; messages are invalid or end with the
                assistant's (``parse_prompt``); there is no chat template, or it rejects a chat.
        """
        texts = [place for place, prompt in enumerate(prompts) if isinstance(prompt, str)]
        chats = [place for place, prompt in enumerate(prompts) if isinstance(prompt, list | tuple)]
        ids: dict[int, list[int]] = {}
        if chats:
            with rows_are_inputs(chats):
                parsed = [
                    parse_prompt(self.recipe, prompts[place], f"{row_name(row)}: ")
                    for row, place in enumerate(chats)
                ]
                ids |= dict(zip(chats, self._chats.prompts(parsed), strict=True))
        with rows_are_inputs(texts):
            rows = self._tokens.prompts([prompts[place] for place in texts])
        ids |= dict(zip(texts, rows, strict=True))
        reject_inputs(
            [prompt for place, prompt in enumerate(prompts) if place not in ids],
            "a text or a list of messages",
        )
        return self._prompts([ids[place] for place in range(len(prompts))])

    def collate_prompts(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Return ``input_ids`` and ``attention_mask``, ``(batch, longest)``, padded on the left."""
        prompts = [examples.columns["prompt"][index] for index in indices]
        return pad_tokens(prompts, self.pad_token_id, "left")


def _before_last(logits: Tensor) -> Tensor:
    """Drop the last of ``(batch, length, vocabulary)``; return logits at targets unchanged."""
    return logits[:, :-1] if logits.ndim == 3 else logits

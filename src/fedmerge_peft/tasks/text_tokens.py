"""Token ids of texts, and of prompts with completions, for causal language modeling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.tokenization import SpecialTokens, tokenized

logger = logging.getLogger(__name__)


class TextTokens:
    """Conversion of texts to the token ids that causal language models expect.

    Args:
        tokenizer: Tokenizer of transformers.
        reading: How to read special tokens that are written in texts, such as ``</s>``. ``text``:
            as characters; ``tokens``: as special tokens; None: ``reject_special`` refuses them.
    """

    def __init__(self, tokenizer: Any, reading: Literal["text", "tokens"] | None) -> None:
        self._tokenizer = tokenizer
        self._reading = reading
        tokenizer.split_special_tokens = reading != "tokens"
        eos = tokenizer.eos_token_id
        self._adds_eos = eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]

    def reject_special(self, texts: Sequence[str]) -> None:
        """Raise ``DataError`` for the first text with refused special tokens.

        If ``reading`` is None, all special tokens are refused. If it is ``text``, special tokens
        are refused only if the tokenizer cannot read them as characters. If it is ``tokens``, none
        are refused.
        """
        if self._reading == "tokens":
            return
        special = SpecialTokens(self._tokenizer)
        for row, text in enumerate(texts):
            written = special.first_in(text)
            if written is None:
                continue
            where = f"{row_name(row)}: the text contains the special token {written!r}"
            if self._reading is None:
                raise DataError(
                    f"{where}; set task.special_tokens=text to read it as characters, or "
                    "task.special_tokens=tokens if the texts were rendered with a chat template"
                )
            (ids,) = self.rows([text], special=False)
            if special.count(ids):
                raise DataError(
                    f"{where}, which this tokenizer does not read as characters; remove it"
                )

    def rows(
        self, texts: Sequence[str], *, special: bool = True, end: bool = False
    ) -> list[list[int]]:
        """Return the token ids of each text.

        Args:
            texts: Texts.
            special: Add the tokenizer's special tokens, except an end-of-sequence token at the end.
            end: Append the end-of-sequence token, if the tokenizer has one.
        """
        eos = self._tokenizer.eos_token_id
        rows: list[list[int]] = []
        for encoded in tokenized(self._tokenizer, texts, add_special_tokens=special):
            ids = encoded["input_ids"]
            tokens = ids[:-1] if special and self._adds_eos else ids
            rows.append([*tokens, eos] if end and eos is not None else list(tokens))
        return rows

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each prompt.

        A prompt without tokens is replaced by the begin-of-sequence token, because the model
        predicts the first token of a completion from the token before it.

        Raises:
            DataError: A prompt has no tokens, and the tokenizer has no begin-of-sequence token.
        """
        bos = self._tokenizer.bos_token_id
        rows = [ids or ([] if bos is None else [bos]) for ids in self.rows(prompts)]
        empty = next((row for row, ids in enumerate(rows) if not ids), None)
        if empty is not None:
            raise DataError(
                f"{row_name(empty)}: the prompt is empty, and the "
                "tokenizer has no begin-of-sequence token to replace it; fill it in, or remove it"
            )
        return rows

    def pairs(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of each prompt and of its completion.

        A completion ends with an end-of-sequence token, if the tokenizer has one. If a prompt's
        tokens are not a prefix of the tokens of prompt + completion, both are tokenized separately,
        with a warning. The completion of an empty prompt is also tokenized separately, but without
        a warning. Errors are those of ``prompts``.
        """
        starts = self.prompts(prompts)
        joined = self.rows(
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            end=True,
        )
        # A begin-of-sequence token has replaced each empty prompt. Not all tokenizers add it to
        # prompt + completion, so the completion of an empty prompt is tokenized separately.
        mismatched = [
            row
            for row, start in enumerate(starts)
            if prompts[row] and joined[row][: len(start)] != start
        ]
        separate = sorted({*mismatched, *(row for row, prompt in enumerate(prompts) if not prompt)})
        alone = dict(
            zip(
                separate,
                self.rows([completions[row] for row in separate], special=False, end=True),
                strict=True,
            )
        )
        if mismatched:
            logger.warning(
                "in %d of %d rows the prompt's tokens are not a prefix of the tokens of prompt + "
                "completion (first: row %d, from 0); both were tokenized separately. Often the "
                "prompt ends with a space that belongs to the completion",
                len(mismatched),
                len(starts),
                mismatched[0],
            )
        return [
            (start, alone[row] if row in alone else joined[row][len(start) :])
            for row, start in enumerate(starts)
        ]

    def truncate_left(self, prompt: list[int], length: int) -> list[int]:
        """Truncate a prompt on the left to ``length`` tokens; keep a begin-of-sequence token."""
        if len(prompt) <= length:
            return prompt
        if length > 0 and prompt[0] == self._tokenizer.bos_token_id:
            return [prompt[0], *prompt[len(prompt) - length + 1 :]]
        return prompt[len(prompt) - length :]

    def kept(
        self, ids: Sequence[int], labeled: Sequence[bool], length: int, *, whole: bool
    ) -> list[int]:
        """Return the indices of the tokens of an example that truncation keeps, in order.

        Examples longer than ``length`` are truncated on the right if that keeps a token with a loss
        (except with ``whole``), or if no token has a loss. Otherwise, the first run of tokens with
        a loss is kept, and the context before it is truncated on the left, but keeps a
        begin-of-sequence token. At least one token of the context remains, because the model
        predicts the next token from it. If there is no room for the whole run, the run is truncated
        on the right.

        Args:
            ids: Token ids.
            labeled: True for tokens with a loss.
            length: Maximum length.
            whole: Keep as much as possible of the first run of tokens with a loss, at the cost of
                the context before it.
        """
        if len(ids) <= length or (not whole and any(labeled[1:length])) or not any(labeled):
            return list(range(min(len(ids), length)))
        begin = labeled.index(True)
        end = labeled.index(False, begin) if False in labeled[begin:] else len(ids)
        room = min(begin, max(length - (end - begin), min(1, begin)))
        context = list(range(begin - room, begin))
        if context and ids[0] == self._tokenizer.bos_token_id:
            context[0] = 0
        return [*context, *range(begin, min(end, begin + length - len(context)))]

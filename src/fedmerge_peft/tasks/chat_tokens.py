"""Token ids of chats, and a mask of the tokens with a loss."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.chat_messages import Chat, Message
from fedmerge_peft.tasks.chat_template import (
    check_contents,
    check_template,
    strings,
    warn_of_missing_stops,
    with_json_arguments,
)
from fedmerge_peft.tasks.chat_turns import (
    Span,
    TurnError,
    begin_of_turn,
    common_prefix,
    find_begin,
    find_end,
    same_turns,
)
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.tokenization import SpecialTokens, tokenized
from fedmerge_peft.util.library_errors import library_errors

logger = logging.getLogger(__name__)

_OTHERS = {"user", "system", "developer", "tool"}
"""Roles whose messages a model does not write."""
Loss = Literal["assistant", "completion", "all"]
"""Part of an example that has a loss."""
Row = tuple[list[int], list[bool]]
"""Token ids of an example, and True for each token with a loss."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_NOT_FOUND = (
    "the assistant's turns are not found in the chat; usually, the chat template renders them "
    "differently without the messages after them, or writes nothing for an empty message; use "
    "another task.chat_template or, in the task causal-lm, either set task.loss=all, or set "
    "task.loss=assistant and put {% generation %} and {% endgeneration %} around the assistant's "
    "turns in the template"
)


class ChatTokens:
    """Converter of chats to token ids, with the tokenizer's chat template.

    Special tokens that are written in messages are read as characters.

    Args:
        tokenizer: Tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)

    def rows(self, chats: Sequence[Chat], loss: Loss) -> list[Row]:
        """Tokenize chats, and mark the tokens with a loss.

        Args:
            chats: Chats.
            loss: Part with a loss. assistant: all turns of the assistant, as the template marks
                them or, without marks, as the module ``chat_turns`` finds them; completion: the
                messages from the index ``chat.prompt`` on; all: all tokens. Marks are not used in
                chats whose messages contain special tokens.

        Returns:
            Token ids, and True for each token with a loss, one pair per chat.

        Raises:
            DataError: There is no default chat template; it rejects a chat, or leaves out a tool of
                the chat; a chat has no turn to learn, or the turn is not found.
        """
        check_template(self._tokenizer)
        texts = [self._render(row, chat, chat.messages) for row, chat in enumerate(chats)]
        check_contents(chats, texts, self.error)
        written = [self._writes_tokens(chat.messages) for chat in chats]
        spans: list[list[Span]] = []
        disagreeing = []
        for row, (chat, text) in enumerate(zip(chats, texts, strict=True)):
            own, agree = ([], True) if written[row] else self._spans(row, chat, text, loss)
            spans.append(own)
            disagreeing += [] if agree else [row]
        if disagreeing:
            logger.warning(
                "in %d of %d chats the parts that the chat template marks as generated differ "
                "from the assistant's messages (first: row %d, from 0), and have the loss; if "
                "wrong, move {%% generation %%} and {%% endgeneration %%} in task.chat_template",
                len(disagreeing),
                len(chats),
                disagreeing[0],
            )
        with self._reading_tokens():
            rows = [(ids, [False] * len(ids)) for ids in self._ids(texts)]
            pieces = [(row, piece) for row, own in enumerate(spans) for piece in own]
            begins = self._ids([texts[row][:begin] for row, (begin, _) in pieces])
            ends = self._ids([texts[row][:end] for row, (_, end) in pieces])
            for (row, _), before, until in zip(pieces, begins, ends, strict=True):
                _label(rows[row], before, until)
            self._warn_about_prompts(rows, chats, written, loss)
            rows = [
                self._sanitized_row(row, chats[row], loss) if written[row] else rows[row]
                for row in range(len(chats))
            ]
        warn_of_missing_stops(self._tokenizer, rows)
        return rows

    def _warn_about_prompts(
        self, rows: Sequence[Row], chats: Sequence[Chat], written: Sequence[bool], loss: Loss
    ) -> None:
        """Warn of chats whose last turn with a loss does not follow the generation prompt.

        Chats whose messages contain special tokens (``written``) are not checked.
        """
        if loss == "all":
            return
        last = {
            row: self._turns(row, chat, loss)[-1][0]
            for row, chat in enumerate(chats)
            if not written[row]
        }
        prompts = self._ids(
            [
                self._render(row, chats[row], chats[row].messages[:turn], generation_prompt=True)
                for row, turn in last.items()
                if turn
            ]
        )
        other = [
            row
            for row, prompt in zip(
                (row for row, turn in last.items() if turn), prompts, strict=True
            )
            if rows[row][0][: len(prompt)] != prompt
        ]
        if other:
            logger.warning(
                "in %d of %d chats the assistant's last turn does not follow the generation prompt "
                "of the chat template (first: row %d, from 0), so generation starts differently "
                "from training; try another task.chat_template",
                len(other),
                len(chats),
                other[0],
            )

    def prompts(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Tokenize the messages before the completions, with the generation prompt.

        Raises:
            DataError: There is no chat template, or it rejects a chat.
        """
        check_template(self._tokenizer)
        prompts = [chat.messages[: chat.prompt] for chat in chats]
        texts = [
            self._render(row, chat, prompt, generation_prompt=True)
            for row, (chat, prompt) in enumerate(zip(chats, prompts, strict=True))
        ]
        with self._reading_tokens():
            return [
                self._sanitized(row, chats[row], prompts[row], generation_prompt=True)
                if self._writes_tokens(prompts[row])
                else ids
                for row, ids in enumerate(self._ids(texts))
            ]

    def final_turns(self, chats: Sequence[Chat]) -> tuple[list[list[int]], list[str]]:
        """Return each chat's tokens for generation, and the content of its last message.

        The tokens are those of the messages before the last one, with the generation prompt.

        Raises:
            DataError: The last message is not the assistant's; there is no chat template, or it
                rejects a chat.
        """
        for row, chat in enumerate(chats):
            if chat.roles[-1] != "assistant":
                raise self.error(
                    row,
                    f"the last message has the role {chat.roles[-1]}, but metrics of generated "
                    "text need one of the assistant; end the chat with one, remove the row, or "
                    "use perplexity or accuracy in task.metrics",
                )
        last = [Chat(chat.messages, len(chat.messages) - 1, chat.tools) for chat in chats]
        return self.prompts(last), [chat.messages[-1]["content"] for chat in chats]

    def roles(self, chats: Sequence[Chat], rows: Sequence[Row]) -> list[list[str]]:
        """Return, for each token of the examples, the role of the message that contains it.

        If the end of a message is not found, its tokens get the role of the next message.
        """
        roles = []
        with self._reading_tokens():
            for row, (chat, (ids, _)) in enumerate(zip(chats, rows, strict=True)):
                own: list[str] = []
                for index, role in enumerate(chat.roles):
                    end = self._end_of_message(row, chat, index, ids)
                    own += [role] * (end - len(own))
                roles.append(own)
        return roles

    def _end_of_message(self, row: int, chat: Chat, index: int, ids: Sequence[int]) -> int:
        """Return the number of tokens up to the end of a message; 0 if it is not found."""
        messages = chat.messages
        if index == len(messages) - 1:
            return len(ids)
        try:
            if self._writes_tokens(messages):
                return common_prefix(ids, self._sanitized(row, chat, messages[: index + 1]))
            text = self._render(row, chat, messages)
            end = find_end(messages, index, text, partial(self._render, row, chat))
        except (DataError, TurnError):
            return 0
        return common_prefix(ids, self._ids([text[:end]])[0])

    def error(self, row: int, fault: str) -> DataError:
        """Return a ``DataError`` that names a chat and states its fault."""
        return DataError(f"{row_name(row)}: {fault}")

    # ---- turns -----------------------------------------------------------------------------------
    def _turns(self, row: int, chat: Chat, loss: Loss) -> list[tuple[int, int]]:
        """Return the indices of the first and last message of each part with a loss.

        Raises ``DataError`` if there is no such part.
        """
        if loss == "all":
            return [(0, len(chat.messages) - 1)]
        if loss == "completion":
            if set(roles := chat.roles[chat.prompt :]) <= _OTHERS:
                raise self.error(
                    row,
                    f"the completion is not a turn of the assistant (roles: {join_values(roles)}); "
                    "end the chat with one, remove the row, or set task.loss=all "
                    "(only in the task causal-lm)",
                )
            return [(chat.prompt, len(chat.messages) - 1)]
        turns = [(index, index) for index, role in enumerate(chat.roles) if role == "assistant"]
        if not turns:
            raise self.error(
                row,
                f"no message has the role assistant (roles: {join_values(chat.roles)}), so there "
                "is nothing to learn; remove the row, or set task.loss=all",
            )
        return turns

    def _spans(self, row: int, chat: Chat, text: str, loss: Loss) -> tuple[list[Span], bool]:
        """Return the parts of a rendered chat that have a loss.

        The second result is False if the template's marks differ from the turns that are found.
        Raises ``DataError`` if there is no turn to learn, or it is neither marked nor found.
        """
        if loss == "all":
            return [(0, len(text))], True
        render = partial(self._render, row, chat)
        marked = self._marked(chat) if loss == "assistant" else []
        try:
            spans = [
                (
                    find_begin(chat.messages, first, text, render),
                    find_end(chat.messages, last, text, render),
                )
                for first, last in self._turns(row, chat, loss)
            ]
        except TurnError:
            if not marked:
                raise self.error(row, _NOT_FOUND) from None
            return marked, True
        if any(end <= begin for begin, end in spans) and not marked:
            raise self.error(row, _NOT_FOUND)
        return marked or spans, not marked or same_turns(text, marked, spans)

    def _marked(self, chat: Chat) -> list[Span]:
        """Return the parts of a rendered chat that the template marks as generated, if any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(None, chat.tools)
        if not _MARKS.search(template):
            return []

        def render(messages: list[Message]) -> Any:
            return render_jinja_template(
                [messages],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )

        _, (spans,) = with_json_arguments(render, chat.messages)
        return [(begin, end) for begin, end in spans if begin < end]

    # ---- the template ----------------------------------------------------------------------------
    def _render(
        self, row: int, chat: Chat, messages: list[Message], *, generation_prompt: bool = False
    ) -> str:
        return str(self._apply(row, chat, messages, generation_prompt, tokenize=False))

    def _apply(
        self,
        row: int,
        chat: Chat,
        messages: list[Message],
        generation_prompt: bool,
        **options: bool,
    ) -> Any:
        """Apply the chat template. Raises ``DataError`` if it rejects the messages."""

        def rejected(reason: str) -> DataError:
            fault = f"the chat template rejects the messages: {reason}"
            return self.error(row, f"{fault}; change them, or set another task.chat_template")

        def apply(written: list[Message]) -> Any:
            return self._tokenizer.apply_chat_template(
                written, tools=chat.tools, add_generation_prompt=generation_prompt, **options
            )

        with library_errors(rejected):
            return with_json_arguments(apply, messages)

    # ---- tokens ----------------------------------------------------------------------------------
    @contextmanager
    def _reading_tokens(self) -> Iterator[None]:
        """Make the tokenizer read special tokens as tokens; restore its setting at the end."""
        before = getattr(self._tokenizer, "split_special_tokens", False)
        self._tokenizer.split_special_tokens = False
        try:
            yield
        finally:
            self._tokenizer.split_special_tokens = before

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            list(encoded["input_ids"])
            for encoded in tokenized(self._tokenizer, texts, add_special_tokens=False)
        ]

    def _writes_tokens(self, messages: Sequence[Message]) -> bool:
        """Return True if any of the messages contains the text of a special token."""
        return any(
            self._special.first_in(text) for message in messages for text in strings(message)
        )

    def _sanitized(
        self, row: int, chat: Chat, messages: list[Message], *, generation_prompt: bool = False
    ) -> list[int]:
        """Tokenize messages; read special tokens that are written in them as characters."""
        options = {"sanitize_control_tokens": True, "return_dict": False}
        return list(self._apply(row, chat, messages, generation_prompt, **options))

    def _sanitized_row(self, row: int, chat: Chat, loss: Loss) -> Row:
        """Tokenize a chat whose messages contain special tokens, and mark the tokens with a loss.

        The turns are found by comparing token ids. Raises ``DataError`` if one is not found.
        """
        ids = self._sanitized(row, chat, chat.messages)
        labeled = [loss == "all"] * len(ids)
        for first, last in self._turns(row, chat, loss) if loss != "all" else ():
            before, until = chat.messages[:first], chat.messages[: last + 1]
            begin = begin_of_turn(
                ids,
                self._sanitized(row, chat, before) if before else None,
                self._sanitized(row, chat, before, generation_prompt=True) if before else None,
            )
            end = self._sanitized(row, chat, until)
            if begin is None or ids[: len(end)] != end:
                raise self.error(
                    row,
                    "a message contains a special token, and a turn of the assistant is not found: "
                    "it is the first message, or the chat template renders it differently without "
                    "the messages after it; remove the special token or the row, or set "
                    "task.loss=all (only in the task causal-lm)",
                )
            labeled[begin : len(end)] = [True] * (len(end) - begin)
        return ids, labeled


def _label(row: Row, before: Sequence[int], until: Sequence[int]) -> None:
    """Mark the tokens that overlap a part of a text as labeled, in place.

    Args:
        row: Token ids of the text, and True for each labeled token.
        before: Token ids of the text before the part.
        until: Token ids of the text up to the end of the part.
    """
    ids, labeled = row
    begin, end = common_prefix(ids, before), common_prefix(ids, until)
    end = min(end + (end < len(until)), len(ids))
    labeled[begin:end] = [True] * (end - begin)

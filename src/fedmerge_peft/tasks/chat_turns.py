"""Position of the assistant's turns in a rendered chat.

A turn is the text that the model writes. It begins after the generation prompt and ends with the
template's end of a turn. Templates can mark turns (``{% generation %}``). Without marks, turn i is
the difference between the renderings of the first i and the first i + 1 messages, if both
renderings are prefixes of the rendered chat:

    begin = length of render(messages[:i], generation prompt)
    end   = length of render(messages[:i + 1])

Some templates render a message differently if other messages follow it: Qwen 3 removes the
reasoning of earlier turns, and Mistral moves the system prompt to the last question. For such
templates, the content of the turn is the part of the rendered chat that changes if this content is
replaced. The turn also includes the text, such as an end token, that the template writes after the
content if the chat ends with this turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.chat_messages import Message

Render = Callable[..., str]
"""``render(messages, generation_prompt=False)``, which returns the text of a chat. It raises
``DataError`` if the template rejects the messages."""
Span = tuple[int, int]
"""Begin and end of a part of a text."""

_MARKER = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
_LONGEST_MARKER = 64
_OTHER_CONTENTS = ("0 other 1", "Z words z")
"""Two contents of messages that differ in their first and in their last characters. Therefore at
least one of them differs from a given text in its first character, and at least one in its last."""


class TurnError(Exception):
    """A turn cannot be found in the rendered chat."""


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two texts or two lists of tokens.

    If two texts differ inside a marker, such as <|user|> or [INST], the prefix ends before it.
    """
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:
        return shortest
    pairs = zip(first, second, strict=False)
    length = next(place for place, (one, other) in enumerate(pairs) if one != other)
    if not isinstance(first, str) or not isinstance(second, str):
        return length
    markers = (
        marker.start()
        for text in (first, second)
        for marker in _MARKER.finditer(text, max(0, length - _LONGEST_MARKER))
        if marker.start() < length < marker.end()
    )
    return min(markers, default=length)


def begin_of_turn(
    whole: Sequence[Any], before: Sequence[Any] | None, prompt: Sequence[Any] | None
) -> int | None:
    """Return the index at which a turn begins; None if it is unknown.

    It is unknown if ``prompt`` is None, or the chat begins with neither ``prompt`` nor ``before``.

    Args:
        whole: Rendered chat, as text or tokens.
        before: Rendered messages before the turn; None if there are none, or the template rejects
            them.
        prompt: The same with the generation prompt. The chat may lack the end of this prompt. For
            example, the generation prompt of DeepSeek R1 ends with the beginning of the reasoning,
            and its template removes reasoning from chats.
    """
    if prompt is not None and whole[: len(prompt)] == prompt:
        return len(prompt)
    if prompt is not None and before is not None and whole[: len(before)] == before:
        return common_prefix(whole, prompt)
    return None


def find_begin(messages: Sequence[Message], index: int, whole: str, render: Render) -> int:
    """Find the beginning of the assistant's turn ``messages[index]`` in the rendered chat.

    Args:
        messages: Chat.
        index: Index of the turn.
        whole: ``render(messages)``.
        render: Function that renders messages.

    Raises:
        TurnError: The turn is not found.
    """
    before = _try(render, messages[:index])
    prompt = _try(render, messages[:index], generation_prompt=True)
    begin = begin_of_turn(whole, before, prompt)
    if begin is not None:
        return begin
    begin, _ = _find_content(messages, index, whole, render)
    alone = _try(render, messages[: index + 1])
    begin_alone = None if alone is None else begin_of_turn(alone, before, prompt)
    if alone is None or begin_alone is None:
        return begin
    # the template may write something between the generation prompt and the content
    added = alone[begin_alone : _find_content(messages[: index + 1], index, alone, render)[0]]
    return begin - len(added) if whole[:begin].endswith(added) else begin


def find_end(messages: Sequence[Message], index: int, whole: str, render: Render) -> int:
    """Find the end of ``messages[index]``, which may have any role, in the rendered chat.

    Arguments and errors are those of ``find_begin``.
    """
    if index == len(messages) - 1:
        return len(whole)
    alone = _try(render, messages[: index + 1])
    if alone is not None and whole.startswith(alone):
        return len(alone)
    _, end = _find_content(messages, index, whole, render)
    if alone is None:
        return end
    _, end_alone = _find_content(messages[: index + 1], index, alone, render)
    return end + common_prefix(whole[end:], alone[end_alone:])


def _find_content(messages: Sequence[Message], index: int, whole: str, render: Render) -> Span:
    """Find the part of a rendered chat that changes with the content of a message.

    Raises ``TurnError`` if there is no such part, or the template rejects other content.
    """
    begin, end = len(whole), 0
    for content in _OTHER_CONTENTS:
        changed = [*messages]
        changed[index] = _with_content(messages[index], content)
        other = _try(render, changed)
        if other is None:
            raise TurnError
        first = common_prefix(whole, other)
        last = common_prefix(whole[first:][::-1], other[first:][::-1])
        begin, end = min(begin, first), max(end, len(whole) - last)
    if end <= begin:
        raise TurnError
    return begin, end


def _with_content(message: Message, content: str) -> Message:
    """Return a message with another content or, if it only calls tools, another tool name."""
    if message["content"].strip() or not message.get("tool_calls"):
        return {**message, "content": content}
    *calls, last = message["tool_calls"]
    function = last.get("function")
    other = (
        {**last, "name": content}
        if function is None
        else {**last, "function": {**function, "name": content}}
    )
    return {**message, "tool_calls": [*calls, other]}


def _try(render: Render, messages: Sequence[Message], **options: bool) -> str | None:
    """Render messages; return None if there are none or the template rejects them."""
    if not messages:
        return None
    try:
        return render(list(messages), **options)
    except DataError:
        return None


def same_turns(whole: str, first: Sequence[Span], second: Sequence[Span]) -> bool:
    """Return True if two lists of spans cover the same characters, except for whitespace."""
    covered = [
        {place for begin, end in spans for place in range(begin, end) if not whole[place].isspace()}
        for spans in (first, second)
    ]
    return covered[0] == covered[1]

"""Chats as rows of a table: messages, prompts with completions, and ShareGPT's conversations.

Column names and their meaning follow TRL's data set formats. Every row becomes a list of messages
as chat templates expect them: ``role``, ``content`` as text, and possibly ``tool_calls``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.tasks import CausalLMRecipe

Message = dict[str, Any]
"""``role``, ``content``, and further keys that the chat template reads."""

CONVERSATIONS = "conversations"
"""Column of ShareGPT's format. It is read if the table lacks the column ``recipe.messages``."""
_SYSTEM = "system"
"""Optional column beside ``conversations`` with the system prompt of each row."""
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Roles of chat templates by their names in ShareGPT's format."""


@dataclass(frozen=True)
class Chat:
    """Messages of one row, or of one prompt to complete."""

    messages: list[Message]
    prompt: int
    """Number of messages before the completion. The completion is the last message, unless the
    chat is read from a column of prompts and a column of completions. In a prompt to complete, this
    is the number of all messages."""
    tools: list[Any] | None = None
    """Descriptions of the tools that the assistant may call; None if there are none."""

    @property
    def roles(self) -> list[str]:
        """Roles of the messages."""
        return [message["role"] for message in self.messages]


def chat_columns(recipe: CausalLMRecipe, table: Dataset) -> list[str]:
    """Return the columns that contain the chats: one column, or prompt and completion.

    A column of messages or conversations comes first, unless ``recipe.format`` is
    prompt-completion. Prompt and completion are chats if the entries of both are lists, or if
    ``recipe.format`` is messages. The result is empty if the table has no chats, or if
    ``recipe.format`` is text or instruction, which read other columns.

    Raises:
        DataError: Only one of prompt and completion has lists, ``recipe.format`` is not messages,
            and there is no column of chats that comes first.
    """
    if recipe.format in ("text", "instruction"):
        return []
    for column in (recipe.messages, CONVERSATIONS):
        if column in table.column_names and recipe.format != "prompt-completion":
            return [column]
    pair = [recipe.prompt, recipe.completion]
    if not set(pair) <= set(table.column_names):
        return []
    # format=messages also accepts JSON text, and the columns of empty tables, which lack a type
    if recipe.format == "messages" or have_messages(table, pair, "task.completion"):
        return pair
    return []


def have_messages(table: Dataset, columns: Sequence[str], key: str) -> bool:
    """Return True if the entries of two columns, of prompts and completions, are lists.

    Return False if neither column has lists. As in TRL, chats and texts cannot be combined.

    Raises:
        DataError: Only one of the columns has lists. The message names ``key``, which is the recipe
            key of the completions.
    """
    lists = [hasattr(table.features[column], "feature") for column in columns]
    if any(lists) and not all(lists):
        chats, texts = columns if lists[0] else reversed(columns)
        raise DataError(
            f"{key}: the column {chats!r} has lists of messages, but {texts!r} does not; write "
            "texts in both, or lists of {role, content} in both"
        )
    return all(lists)


def read_chats(recipe: CausalLMRecipe, table: Dataset) -> list[Chat]:
    """Read the chats of all rows.

    Args:
        recipe: Names of the columns, and the system prompt.
        table: Rows with the columns that ``chat_columns`` returns.

    Raises:
        DataError: A message is invalid (``parse_messages``); a system prompt is not text; tools are
            not a list.
    """
    columns = chat_columns(recipe, table)
    systems = columns == [CONVERSATIONS] and _SYSTEM in table.column_names
    read = [*columns, *([recipe.tools] if recipe.tools in table.column_names else [])]
    entries = table.select_columns([*read, *([_SYSTEM] * systems)]).with_format(None)[:]
    chats = []
    for row in range(len(table)):
        where = f"{row_name(row)}: "
        parts = [parse_messages(entries[column][row], column, where) for column in columns]
        messages = [message for part in parts for message in part]
        own = entries[_SYSTEM][row] if systems else None
        messages = add_system(_system_prompt(own, where) or recipe.system_prompt, messages)
        prompt = len(messages) - (1 if len(parts) == 1 else len(parts[1]))
        tools = (
            _tools(entries[recipe.tools][row], recipe.tools, where)
            if len(read) > len(columns)
            else None
        )
        chats.append(Chat(messages, prompt, tools))
    return chats


def parse_prompt(recipe: CausalLMRecipe, value: Any, where: str) -> Chat:
    """Convert messages to a chat that the assistant is to continue.

    Args:
        recipe: Section with the system prompt.
        value: List of messages.
        where: Beginning of error messages.

    Raises:
        DataError: A message is invalid (``parse_messages``), or the last is the assistant's.
    """
    messages = add_system(recipe.system_prompt, parse_messages(value, "messages", where))
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}the last message is the assistant's, so there is nothing to answer; end with "
            "a message of the user"
        )
    return Chat(messages, len(messages))


def add_system(prompt: str | None, messages: list[Message]) -> list[Message]:
    """Put a system prompt, if any, before messages.

    Messages that begin with one of the system or the developer are returned unchanged.
    """
    if prompt is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": prompt}, *messages]


def _system_prompt(value: Any, where: str) -> str | None:
    """Check and return an entry of the column with system prompts; None if it is empty or null.

    Raises ``DataError`` if it is not a text.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}{_SYSTEM!r} must be a text, not {_shown(value)}")
    return value or None


def parse_messages(value: Any, column: str, where: str) -> list[Message]:
    """Convert one chat to the messages that chat templates expect.

    ``from`` and ``value`` become ``role`` and ``content``. Text parts of a content are joined. A
    ``function_call`` becomes one of ``tool_calls``. JSON objects in arguments of tool calls are
    parsed. Keys with the value None are removed, because Arrow gives all messages the same keys,
    with None for those that a message lacks.

    Args:
        value: List of messages, or its JSON text.
        column: Name of the column, for error messages.
        where: Beginning of error messages, such as the row.

    Raises:
        DataError: There is no list of messages, or it is empty; a message lacks a role or, without
            tool calls, a text; it has an invalid part or tool call, or a weight other than 1.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f"{where}{column!r} must be a list of at least one {{role, content}}, not "
            f"{_shown(value)}"
        )
    return [_message(message, column, where) for message in value]


def _message(message: Any, column: str, where: str) -> Message:
    cleaned = _without_nulls(message) if isinstance(message, dict) else {}
    if "from" in cleaned and "role" not in cleaned:
        role = cleaned.pop("from")
        cleaned = {
            "role": _ROLES.get(str(role), role),
            "content": cleaned.pop("value", None),
            **cleaned,
        }
    content = cleaned.get("content")
    if isinstance(content, list):
        content = _joined(content, column, where)
    if "function_call" in cleaned:  # the older form of a single call
        cleaned["tool_calls"] = [{"function": cleaned.pop("function_call")}]
    if "tool_calls" in cleaned:
        cleaned["tool_calls"] = _tool_calls(cleaned["tool_calls"], column, where)
        content = "" if content is None else content
    if not isinstance(cleaned.get("role"), str) or not isinstance(content, str):
        raise DataError(
            f"{where}a message in {column!r} needs a role and a content, both text, not "
            f"{_shown(message)}"
        )
    if cleaned.get("weight", 1) != 1:
        raise DataError(
            f"{where}a message in {column!r} has the weight {cleaned['weight']!r}, but only the "
            "weight 1 is supported, which is also that of a message without this key; remove the "
            "key weight, or end the chat before this message"
        )
    return {**cleaned, "content": content}


def _joined(parts: Sequence[Any], column: str, where: str) -> str:
    """Join the parts of a content; raise ``DataError`` if one of them is not text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            fault = (
                f"without a text: {_shown(part)}"
                if kind == "text"
                else f"of the type {kind!r}; only parts of text are supported"
            )
            raise DataError(f"{where}a message in {column!r} has a part {fault}")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, column: str, where: str) -> list[Any]:
    """Check tool calls, and parse arguments that are the JSON of an object.

    Raises ``DataError`` for a call without the name of a function.
    """
    calls = _parsed(calls) if isinstance(calls, str) else calls
    checked = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}a tool call in {column!r} needs a function with a name, not {_shown(call)}"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and isinstance(parsed := _parsed(arguments), dict):
            arguments = parsed
        function = {**function, "arguments": arguments}
        checked.append(
            {"type": "function", **call, "function": function} if "function" in call else function
        )
    return checked


def _tools(value: Any, column: str, where: str) -> list[Any] | None:
    """Return the descriptions of tools, parsed if they are JSON; None if there are none.

    Raises ``DataError`` if they are not a list.
    """
    tools = _parsed(value) if isinstance(value, str) else value
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(
            f"{where}{column!r} must be a list of tools, or its JSON, not {_shown(value)}"
        )
    return [_without_nulls(_parsed(tool) if isinstance(tool, str) else tool) for tool in tools]


def _shown(value: Any) -> str:
    return shortened(repr(value), 200)


def _parsed(text: str) -> Any:
    """Parse JSON; return other text unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return text


def _without_nulls(value: Any) -> Any:
    """Remove keys with the value None, at all depths."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value

"""Chat templates of tokenizers, and checks of rendered chats."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.chat_messages import Chat, Message

if TYPE_CHECKING:
    from fedmerge_peft.recipe.tasks import CompletionRecipe

logger = logging.getLogger(__name__)

_CLOCK = "strftime_now"
"""Function of templates that returns the current date. Llama 3.1's template calls it."""
_DATE = datetime(2024, 7, 26)
"""Date that it returns in a run, the default of Llama 3.1. Tokens would else depend on the day."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Message keys for the assistant's reasoning before its answer."""


def check_template(tokenizer: Any) -> None:
    """Check that a tokenizer has a chat template; warn if it writes the current date (``_CLOCK``).

    Raises ``DataError`` if there is no template, or if there are several but none as default.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise DataError(
            "a chat needs a tokenizer with a chat template, but this one has none; set "
            "task.chat_template, name the tokenizer of an instruct or chat model in "
            "backbone.tokenizer, or use prompts and completions of plain text"
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            "task.chat_template: the tokenizer has several chat templates "
            f"({join_values(sorted(templates))}) and none is called default; set "
            "task.chat_template to the name of one of them"
        )
    if _CLOCK in (templates["default"] if isinstance(templates, dict) else templates):
        logger.warning(
            "task.chat_template: the chat template writes the current date; training, evaluation "
            "and predictions of a run write %s instead, so that they do not depend on the day; "
            "for another date, set task.chat_template to a template with this date",
            f"{_DATE:%Y-%m-%d}",
        )


def resolve_template(tokenizer: Any, template: str) -> str:
    """Return the text of a chat template.

    Args:
        tokenizer: Tokenizer with named chat templates, if any.
        template: Text of a template, or the name of one of the tokenizer's. Names have no ``{``.

    Raises:
        DataError: The tokenizer has no template with this name.
    """
    if "{" in template:
        return template
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {}
    if template not in named:
        raise DataError(
            f"task.chat_template: the tokenizer has no template {template!r}; it has "
            f"{'the templates ' + join_values(sorted(named)) if named else 'no named templates'}; "
            f"to name a file, write a dot or a slash, such as ./{template}"
        )
    return str(named[template])


def set_template(tokenizer: Any, recipe: CompletionRecipe) -> None:
    """Set a tokenizer's chat template to the recipe's, and its current date to ``_DATE``.

    If the recipe sets no template, the tokenizer keeps its own, with this date.

    Raises:
        DataError: ``recipe.chat_template`` is a name, and the tokenizer has no template of this
            name.
    """
    if recipe.chat_template is not None:
        tokenizer.chat_template = resolve_template(tokenizer, recipe.chat_template)
    _begin_templates(tokenizer, lambda text: _fixed_clock() if _CLOCK in text else "")


def set_chat_template(tokenizer: Any, recipe: CompletionRecipe) -> None:
    """Set a tokenizer's chat template (``set_template``), and add the recipe's system prompt to it.

    The tokenizer then renders chats as the task does, without the recipe. Chats that begin with a
    message of the system or the developer do not get the recipe's prompt.

    Raises:
        DataError: See ``set_template``.
    """
    set_template(tokenizer, recipe)
    if recipe.system_prompt is None:
        return
    prompt = json.dumps(recipe.system_prompt)
    begin = (
        "{% if messages[0]['role'] not in ['system', 'developer'] %}"
        "{% set messages = [{'role': 'system', 'content': " + prompt + "}] + messages %}"
        "{% endif %}"
    )
    _begin_templates(tokenizer, lambda _: begin)


def _begin_templates(tokenizer: Any, begin: Callable[[str], str]) -> None:
    """Write ``begin(text)`` before the text of a tokenizer's chat template, or of each of them."""
    if not (template := tokenizer.chat_template):
        return
    tokenizer.chat_template = (
        {name: begin(text) + text for name, text in template.items()}
        if isinstance(template, dict)
        else begin(template) + template
    )


def _fixed_clock() -> str:
    """Return the definition of a ``strftime_now`` that formats ``_DATE``, in Jinja."""
    written = {letter: f"{_DATE:%{letter}}" for letter in "aAbBcdfHIjmMpSUwWxXyYzZ"}
    replaced = "".join(
        f".replace('%{letter}', '{text}').replace('%-{letter}', '{text.lstrip('0') or 0}')"
        for letter, text in written.items()
    )
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}"


def check_contents(
    chats: Sequence[Chat], texts: Sequence[str], error: Callable[[int, str], DataError]
) -> None:
    """Check that rendered chats contain their tools; warn if they lack texts of messages.

    Args:
        chats: Chats.
        texts: Rendered chats.
        error: Function that returns the error for the index of a chat and a description of its
            fault.

    Raises:
        DataError: The template leaves out the name of a tool that a chat describes or calls.
    """
    lost = []
    for row, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        for name in tool_names(chat):
            if name not in text:
                raise error(
                    row,
                    f"the chat template leaves out the tool {name!r}, which the chat describes or "
                    "calls; set task.chat_template to one that renders tools, or remove the tools",
                )
        contents = [message["content"].rpartition("</think>")[2] for message in chat.messages]
        # Templates leave out the reasoning of earlier turns on purpose.
        contents += [str(chat.messages[-1].get(key, "")) for key in _REASONING]
        if not all(content.strip() in text for content in contents):
            lost.append(row)
    if lost:
        logger.warning(
            "in %d of %d chats the chat template leaves out or changes the text of messages "
            "(first: row %d, from 0); fedmerge data RECIPE --show 3 shows chats as the model reads "
            "them",
            len(lost),
            len(chats),
            lost[0],
        )


def warn_of_missing_stops(tokenizer: Any, rows: Sequence[tuple[list[int], list[bool]]]) -> None:
    """Warn of examples whose last token with a loss, ignoring whitespace, is an ordinary token.

    A model stops at a special or added token. Without one, it does not learn the end of its turns.
    For example, GLM's template writes no such token at the end of a turn, because the next turn
    begins with one.

    Args:
        tokenizer: Tokenizer.
        rows: Token ids, and True for each token with a loss, one pair per example.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    endless = []
    for row, (ids, labeled) in enumerate(rows):
        learned = (ids[place] for place in reversed(range(len(ids))) if labeled[place])
        last = next((token for token in learned if tokenizer.decode([token]).strip()), None)
        if last is not None and last not in special:
            endless.append(row)
    if endless:
        logger.warning(
            "in %d of %d chats (first: row %d, from 0) the last token with a loss is no special "
            "token, so the model may not learn to stop; change task.chat_template so that each "
            "turn of the assistant ends with a special token (before {%% endgeneration %%}, if the "
            "template has it)",
            len(endless),
            len(rows),
            endless[0],
        )


def with_json_arguments(render: Callable[[list[Message]], Any], messages: list[Message]) -> Any:
    """Render messages; if the template needs arguments of tool calls as text, write them as JSON.

    Most templates take arguments as objects. DeepSeek's joins them to other text, which fails with
    ``TypeError`` for objects.

    Args:
        render: Function that renders messages.
        messages: Messages from ``parse_messages``, which has parsed arguments that are JSON.
    """
    try:
        return render(messages)
    except TypeError:
        written = [_with_json_arguments(message) for message in messages]
        if written == messages:
            raise
        return render(written)


def _with_json_arguments(message: Message) -> Message:
    """Return a message whose tool calls have arguments as JSON text, as ``tojson`` writes it."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        if not isinstance(arguments := function["arguments"], str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


def tool_names(chat: Chat) -> Iterator[str]:
    """Yield the names of the tools that a chat describes or calls."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    for tool in (*(chat.tools or ()), *calls):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(name := function.get("name"), str):
            yield name


def strings(value: Any) -> Iterator[str]:
    """Yield all strings in a nested value, such as a message; keys are not included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)

"""Chat templates of tokenizers, and the names and texts that a rendered chat must contain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.chat_messages import Chat

if TYPE_CHECKING:
    from fedmerge_peft.recipe.tasks import CompletionRecipe


def check_template(tokenizer: Any) -> None:
    """Raise ``DataError`` if a tokenizer has no chat template, or several without a default."""
    templates = tokenizer.chat_template
    if not templates:
        raise DataError(
            "task.format: messages needs a tokenizer with a chat template, but this one has none; "
            "set task.chat_template, name the tokenizer of an instruct or chat model in "
            "backbone.tokenizer, or use prompt and completion columns of plain text"
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            "task.format: messages needs a chat template, but the tokenizer has several "
            f"({join_values(sorted(templates))}) and none is called default; set "
            "task.chat_template to the name of one of them"
        )


def resolve_template(tokenizer: Any, template: str) -> str:
    """Return the text of a chat template; a value without ``{`` is a name in the tokenizer.

    Raises:
        DataError: The tokenizer has no template with this name.
    """
    if "{" in template:
        return template
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {}
    if template not in named:
        raise DataError(
            f"task.chat_template: there is no file {template}, and the tokenizer has "
            f"{'the templates ' + join_values(sorted(named)) if named else 'no named templates'}"
        )
    return str(named[template])


def set_chat_template(tokenizer: Any, recipe: CompletionRecipe) -> None:
    """Set a tokenizer's chat template to the recipe's, and add the system prompt to the template.

    The tokenizer then renders chats as the task does, without the recipe. Chats with a system
    prompt keep theirs.

    Raises:
        DataError: The tokenizer has no template with the recipe's name.
    """
    if recipe.chat_template is not None:
        tokenizer.chat_template = resolve_template(tokenizer, recipe.chat_template)
    if recipe.system_prompt is None or not (template := tokenizer.chat_template):
        return
    prompt = json.dumps(recipe.system_prompt)
    begin = (
        "{% if messages[0]['role'] not in ['system', 'developer'] %}"
        "{% set messages = [{'role': 'system', 'content': " + prompt + "}] + messages %}"
        "{% endif %}"
    )
    tokenizer.chat_template = (
        {name: begin + text for name, text in template.items()}
        if isinstance(template, dict)
        else begin + template
    )


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

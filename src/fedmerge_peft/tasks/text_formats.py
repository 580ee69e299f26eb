"""How rows become prompts and completions: plain text, chats, prompt and completion, instructions.

The column names and their meaning follow TRL's data set formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.tokenization import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.schema import CausalLMRecipe

Paragraph = list[tuple[str, str | None]]
"""Literal text and the field after it, if there is one, in turn."""


@dataclass(frozen=True)
class RowTexts:
    """Texts of all rows, before tokens."""

    learned: Sequence[str]
    """Where the loss is: the whole text or chat, or the completion that follows the prompt."""
    prompts: Sequence[str] | None = None
    """What comes before, without loss; None where the loss is on all of the text."""
    answers: Sequence[tuple[str, str]] | None = None
    """Of chats, where generation needs them: what leads up to the last message, and its content."""


def infer_format(recipe: CausalLMRecipe, table: Dataset) -> str:
    """The format that the recipe names or, without a name, the first one whose columns are there.

    Raises:
        DataError: Where the columns that the format needs are not there.
    """
    needs = {
        "messages": [recipe.messages],
        "prompt-completion": [recipe.prompt, recipe.completion],
        "instruction": [recipe.instruction, recipe.output],
        "text": [recipe.text],
    }
    if recipe.format is not None:
        # The template says which columns an instruction has; only the answer's is sure.
        wanted = [recipe.output] if recipe.format == "instruction" else needs[recipe.format]
        missing = [column for column in wanted if column not in table.column_names]
        if missing:
            raise DataError(
                f"task.format: {recipe.format} needs the column {missing[0]!r}; the data have {join_values(table.column_names)}"
            )
        return recipe.format
    for name, columns in needs.items():
        if set(columns) <= set(table.column_names):
            return name
    choices = "; ".join(f"{name}: {' and '.join(columns)}" for name, columns in needs.items())
    raise DataError(
        f"task.format: the data have {join_values(table.column_names)}, which fits no format ({choices}); name the columns"
    )


def read_row_texts(
    recipe: CausalLMRecipe, format: str, table: Dataset, tokenizer: Any, *, answers: bool
) -> RowTexts:
    """Read the columns of the format.

    Args:
        recipe: Names of the columns, and the template.
        format: One of the names that ``infer_format`` returns.
        table: The rows.
        tokenizer: Its chat template lays out messages.
        answers: Whether the last message of each chat will be generated.

    Raises:
        DataError: For columns that are absent or of the wrong type, nulls, chats that the chat template refuses.
    """
    if format == "messages":
        return _chats(_rows(table, recipe.messages), recipe.messages, tokenizer, answers=answers)
    if format == "text":
        return RowTexts(read_texts(table, recipe.text, "task.text"))
    if format == "prompt-completion":
        return RowTexts(
            read_texts(table, recipe.completion, "task.completion"),
            read_texts(table, recipe.prompt, "task.prompt"),
        )
    return RowTexts(read_texts(table, recipe.output, "task.output"), _instructions(recipe, table))


def parse_template(template: str) -> list[Paragraph]:
    """Paragraphs (what blank lines separate) of a prompt template. Raises ``DataError`` for braces that do not match."""
    try:
        return [
            [(literal, name) for literal, name, _, _ in Formatter().parse(text)]
            for text in template.split("\n\n")
        ]
    except ValueError as error:
        raise DataError(
            f"task.template: {error}; write {{{{ and }}}} for braces that are meant as such"
        ) from error


def fill_template(template: list[Paragraph], values: Mapping[str, str]) -> str:
    """The prompt: fields replaced by their values, without the paragraphs whose only field is empty."""
    paragraphs = []
    for paragraph in template:
        fields = {name for _, name in paragraph if name is not None}
        if len(fields) == 1 and not values[fields.pop()].strip():
            continue
        paragraphs.append(
            "".join(literal + ("" if name is None else values[name]) for literal, name in paragraph)
        )
    return "\n\n".join(paragraphs)


def _instructions(recipe: CausalLMRecipe, table: Dataset) -> list[str]:
    """A prompt a row, from the template."""
    template = parse_template(recipe.template)
    columns: dict[str, list[str]] = {}
    for field in dict.fromkeys(
        name for paragraph in template for _, name in paragraph if name is not None
    ):
        column = {"instruction": recipe.instruction, "input": recipe.input}.get(field, field)
        if field == "instruction":
            columns[field] = read_texts(table, column, "task.instruction")
        elif column in table.column_names:
            columns[field] = ["" if value is None else str(value) for value in _rows(table, column)]
        elif field == "input":
            columns[field] = [""] * len(table)
        else:
            raise DataError(
                f"task.template: {{{field}}} is no column; the data have {join_values(table.column_names)}"
            )
    return [
        fill_template(template, {field: values[row] for field, values in columns.items()})
        for row in range(len(table))
    ]


def _rows(table: Dataset, column: str) -> list[Any]:
    """A column as Python objects, nested ones too."""
    rows: list[Any] = table.select_columns([column]).with_format(None)[:][column]
    return rows


def _chats(rows: Sequence[Any], column: str, tokenizer: Any, *, answers: bool) -> RowTexts:
    """Chats as the chat template lays them out; the last message is the one to generate."""
    if not tokenizer.chat_template:
        raise DataError(
            "task.format: messages needs a tokenizer with a chat template, and this one has none; name one in backbone.tokenizer "
            "(an instruct or chat model's), or use prompt and completion columns"
        )
    learned: list[str] = []
    asked: list[tuple[str, str]] = []
    for row, messages in enumerate(rows):
        chat = _messages(messages, row, column)
        learned.append(_render(tokenizer, chat, row, column))
        if answers:
            if chat[-1]["role"] != "assistant":
                raise DataError(
                    f"row {row} in use: the last message in {column!r} is the {chat[-1]['role']}'s; to generate, it must be assistant's"
                )
            asked.append(
                (
                    _render(tokenizer, chat[:-1], row, column, add_generation_prompt=True),
                    chat[-1]["content"],
                )
            )
    return RowTexts(learned, answers=asked if answers else None)


def _messages(messages: Any, row: int, column: str) -> list[dict[str, Any]]:
    """One chat, without the keys that other chats have and this one lacks."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"row {row} in use: {column!r} must be a list of {{role, content}} with one message at least, not {messages!r}"
        )
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"row {row} in use: a message in {column!r} needs a role and a content, both text, not {message!r}"
            )
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _render(
    tokenizer: Any, chat: list[dict[str, Any]], row: int, column: str, **options: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except TemplateError as error:
        raise DataError(
            f"row {row} in use: the chat template refuses the messages in {column!r}: {error}"
        ) from error

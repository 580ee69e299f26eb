"""Data set formats of causal language modeling: text, chats, prompt-completion, instructions.

Column names and their meaning follow TRL's data set formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from string import Formatter
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.tokenization import SpecialTokens, read_texts
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.tasks import CausalLMRecipe

Paragraph = list[tuple[str, str | None]]
"""Sequence of (literal text, name of the field after it or None)."""


@dataclass(frozen=True)
class RowTexts:
    """Texts of all rows, before tokenization."""

    targets: Sequence[str]
    """Texts with loss: the complete text or chat, or the completion of a prompt."""
    prompts: Sequence[str] | None = None
    """Texts without loss before the targets. None for texts and chats."""
    final_turns: Sequence[tuple[str, str]] | None = None
    """Chats up to the last message, and the content of this message, for generation."""
    tokens: Mapping[int, list[int]] = dataclass_field(default_factory=dict)
    """Token ids of the targets of chats in which special tokens are written as text, by row."""
    turn_tokens: Mapping[int, list[int]] = dataclass_field(default_factory=dict)
    """Token ids of the final turns of such chats."""


def infer_format(recipe: CausalLMRecipe, table: Dataset) -> str:
    """Return the format of the recipe or, by default, the first format whose columns exist.

    Raises:
        DataError: Columns of the format do not exist.
    """
    required = {
        "messages": [recipe.messages],
        "prompt-completion": [recipe.prompt, recipe.completion],
        "instruction": [recipe.instruction, recipe.output],
        "text": [recipe.text],
    }
    if recipe.format is not None:
        # The template determines the other columns of an instruction.
        columns = [recipe.output] if recipe.format == "instruction" else required[recipe.format]
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise DataError(
                f"task.format: {recipe.format} needs the column {missing[0]!r}; "
                f"the data have {join_values(table.column_names)}"
            )
        return recipe.format
    for name, columns in required.items():
        if set(columns) <= set(table.column_names):
            return name
    choices = "; ".join(f"{name}: {' and '.join(columns)}" for name, columns in required.items())
    raise DataError(
        f"task.format: the data have {join_values(table.column_names)}, which match no format "
        f"({choices}); name the columns in the recipe"
    )


def read_row_texts(
    recipe: CausalLMRecipe, format: str, table: Dataset, tokenizer: Any, *, final_turns: bool
) -> RowTexts:
    """Read the texts of all rows.

    Args:
        recipe: Names of the columns, and the prompt template.
        format: Format from ``infer_format``.
        table: Rows.
        tokenizer: Tokenizer, whose chat template renders messages.
        final_turns: Also return the final turns of chats, for generation.

    Raises:
        DataError: A column does not exist, has the wrong type, or has nulls; the chat template
            rejects a chat.
    """
    if format == "messages":
        return _chats(
            _rows(table, recipe.messages), recipe.messages, tokenizer, final_turns=final_turns
        )
    if format == "text":
        return RowTexts(read_texts(table, recipe.text, "task.text"))
    if format == "prompt-completion":
        return RowTexts(
            read_texts(table, recipe.completion, "task.completion"),
            read_texts(table, recipe.prompt, "task.prompt"),
        )
    return RowTexts(read_texts(table, recipe.output, "task.output"), _instructions(recipe, table))


def parse_template(template: str) -> list[Paragraph]:
    """Parse a prompt template into paragraphs, which are separated by blank lines.

    Raises:
        DataError: The braces do not match.
    """
    try:
        return [
            [(literal, name) for literal, name, _, _ in Formatter().parse(text)]
            for text in template.split("\n\n")
        ]
    except ValueError as error:
        raise DataError(
            f"task.template: {error}; write {{{{ and }}}} for literal braces"
        ) from error


def fill_template(template: list[Paragraph], values: Mapping[str, str]) -> str:
    """Replace the fields by their values, and drop paragraphs whose only field is empty."""
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
    """Create the prompt of each row from the template."""
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
                f"task.template: there is no column for {{{field}}}; "
                f"the data have {join_values(table.column_names)}"
            )
    return [
        fill_template(template, {field: values[row] for field, values in columns.items()})
        for row in range(len(table))
    ]


def _rows(table: Dataset, column: str) -> list[Any]:
    """Read a column, possibly nested, as Python objects."""
    rows: list[Any] = table.select_columns([column]).with_format(None)[:][column]
    return rows


def _chats(rows: Sequence[Any], column: str, tokenizer: Any, *, final_turns: bool) -> RowTexts:
    """Render chats with the chat template. The last message is the one to generate."""
    if not tokenizer.chat_template:
        raise DataError(
            "task.format: messages needs a tokenizer with a chat template, but this one has none; "
            "name the tokenizer of an instruct or chat model in backbone.tokenizer, or use prompt "
            "and completion columns"
        )
    check_template(tokenizer)
    special = SpecialTokens(tokenizer)
    targets: list[str] = []
    turns: list[tuple[str, str]] = []
    tokens: dict[int, list[int]] = {}
    turn_tokens: dict[int, list[int]] = {}
    for row, messages in enumerate(rows):
        chat = _messages(messages, row, column)
        written = any(special.first_in(value) for each in chat for value in _strings(each))
        targets.append(_render(tokenizer, chat, row, column))
        if written:
            tokens[row] = _ids(tokenizer, chat, row, column)
        if final_turns:
            if chat[-1]["role"] != "assistant":
                raise DataError(
                    f"row {row} (of the rows in use): the last message in {column!r} has the role "
                    f"{chat[-1]['role']}; generation needs the role assistant"
                )
            prompt = {"add_generation_prompt": True}
            turns.append(
                (_render(tokenizer, chat[:-1], row, column, **prompt), chat[-1]["content"])
            )
            if written:
                turn_tokens[row] = _ids(tokenizer, chat[:-1], row, column, **prompt)
    return RowTexts(targets, None, turns if final_turns else None, tokens, turn_tokens)


def check_template(tokenizer: Any) -> None:
    """Raise ``DataError`` if a tokenizer has several chat templates and none is the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            "task.format: messages needs a chat template, but the tokenizer has several "
            f"({join_values(sorted(templates))}) and none is called default; save the tokenizer "
            "with one of them as its chat_template, and name it in backbone.tokenizer"
        )


def _strings(message: Mapping[str, Any]) -> Iterator[str]:
    return (value for value in message.values() if isinstance(value, str))


def _messages(messages: Any, row: int, column: str) -> list[dict[str, Any]]:
    """Validate one chat, and remove keys without a value, which Arrow adds from other chats."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"row {row} (of the rows in use): {column!r} must be a list of at least one "
            f"{{role, content}}, not {messages!r}"
        )
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"row {row} (of the rows in use): a message in {column!r} needs a role and a "
                f"content, both text, not {message!r}"
            )
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _render(
    tokenizer: Any, chat: list[dict[str, Any]], row: int, column: str, **options: bool
) -> str:
    with _template_errors(row, column):
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def _ids(
    tokenizer: Any, chat: list[dict[str, Any]], row: int, column: str, **options: bool
) -> list[int]:
    """Tokenize a chat; only the template's own special tokens are tokens."""
    with _template_errors(row, column):
        return list(
            tokenizer.apply_chat_template(
                chat, sanitize_control_tokens=True, return_dict=False, **options
            )
        )


def _template_errors(row: int, column: str) -> AbstractContextManager[None]:
    return library_errors(
        lambda reason: DataError(
            f"row {row} (of the rows in use): the chat template rejects the messages in "
            f"{column!r}: {reason}"
        )
    )

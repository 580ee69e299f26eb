"""Data set formats of causal language modeling: text, chats, prompt-completion, instructions.

Column names and their meaning follow TRL's data set formats and, for instructions, Alpaca's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.tasks.chat_messages import chat_columns, read_chats
from fedmerge_peft.tasks.chat_tokens import Loss
from fedmerge_peft.tasks.tokenization import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.tasks import CausalLMRecipe

Paragraph = list[tuple[str, str | None]]
"""Pairs of a literal text, and the name of the field after it; None if no field follows."""


def infer_format(recipe: CausalLMRecipe, table: Dataset) -> str:
    """Return the format of the recipe or, by default, the first format whose columns exist.

    Columns of chats have the format ``messages``, even if one has the prompts and another the
    completions.

    Raises:
        DataError: Columns of the recipe's format do not exist; without a format in the recipe, the
            columns match no format; only one of prompt and completion has lists of messages.
    """
    chats = chat_columns(recipe, table)
    if chats and recipe.format in ("messages", "prompt-completion" if len(chats) == 2 else None):
        return "messages"
    required = {
        "messages": [recipe.messages],
        "prompt-completion": [recipe.prompt, recipe.completion],
        "instruction": [recipe.instruction, recipe.output],
        "text": [recipe.text],
    }
    if recipe.format is not None:
        # The template determines the other columns that the format ``instruction`` needs.
        columns = [recipe.output] if recipe.format == "instruction" else required[recipe.format]
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise DataError(
                f"task.format: {recipe.format} needs the column {missing[0]!r}; "
                f"the data have {join_values(table.column_names)}; name the columns in the recipe, "
                "or choose another format"
            )
        return recipe.format
    if chats:
        return "messages"
    for name, columns in required.items():
        if set(columns) <= set(table.column_names):
            return name
    choices = "; ".join(f"{name}: {' and '.join(columns)}" for name, columns in required.items())
    raise DataError(
        f"task.format: the data have {join_values(table.column_names)}, which match no format "
        f"({choices}); name the columns in the recipe"
    )


def infer_loss(recipe: CausalLMRecipe, format: str, table: Dataset) -> Loss:
    """Return the part of an example that has a loss; by default, the format determines it.

    Raises:
        RecipeError: Examples of the format lack the part that the recipe names.
    """
    loss = recipe.loss
    chats = format == "messages"
    if loss == "assistant" and not chats:
        others = "all" if format == "text" else "completion or all"
        raise RecipeError(
            f"task.loss: assistant needs chats, but the data have the format {format}; use "
            f"{others}, or data with messages"
        )
    if loss == "completion" and format == "text":
        raise RecipeError(
            "task.loss: completion needs prompts and completions, or chats, but the data are "
            "plain text; use all, or other data"
        )
    if loss is not None or format == "text":
        return loss or "all"
    single = chats and len(chat_columns(recipe, table)) == 1
    return "assistant" if single else "completion"


def check_columns(recipe: CausalLMRecipe, table: Dataset) -> None:
    """Raise ``DataError`` if the columns of a table match no format or have unsuitable values."""
    kind = infer_format(recipe, table)
    if kind == "messages":
        read_chats(recipe, table)
    elif kind == "text":
        read_texts(table, recipe.text, "task.text")
    else:
        read_pairs(recipe, kind, table)


def read_pairs(
    recipe: CausalLMRecipe, format: str, table: Dataset
) -> tuple[Sequence[str], Sequence[str]]:
    """Return prompts and completions of all rows.

    Args:
        recipe: Names of the columns, and the prompt template.
        format: prompt-completion or instruction.
        table: Rows.

    Raises:
        DataError: A column does not exist, except that of ``{input}``; prompts, completions,
            instructions or outputs are not text or have nulls; the braces of the template do not
            match.
    """
    if format == "prompt-completion":
        return (
            read_texts(table, recipe.prompt, "task.prompt"),
            read_texts(table, recipe.completion, "task.completion"),
        )
    return _instructions(recipe, table), read_texts(table, recipe.output, "task.output")


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
    """Create the prompt of each row from the template.

    Raises:
        DataError: The column of a field other than ``{input}`` is missing; instructions are not
            text or have nulls; the template's braces do not match.
    """
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

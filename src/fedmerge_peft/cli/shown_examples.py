"""Print the tokens of examples for ``fedmerge data --show``."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fedmerge_peft.data.clients import FederatedData
    from fedmerge_peft.recipe.schema import Recipe
    from fedmerge_peft.tasks.shown import Segment

_STYLES = {"loss": "bold green", "cut": "strike red", "": ""}
"""Styles of tokens with a loss, of tokens that truncation removes, and of other tokens."""

_SEGMENTS, _TOKENS = 16, 160
"""Maximum numbers of segments shown for an example, and of tokens shown for a segment."""


def show_examples(recipe: Recipe, data: FederatedData, count: int, console: Console) -> None:
    """Print the tokens of training examples, one example from each client in turn.

    The last lines count the examples that truncation cuts, among all examples of the clients.

    Args:
        recipe: Recipe with the task, and with the backbone whose tokenizer is loaded.
        data: Table and clients.
        count: Number of examples.
        console: Output.

    Raises:
        DataError: The rows do not match the recipe, or the examples are not texts.
        BackboneError: The tokenizer cannot be loaded.
    """
    from rich.table import Table
    from rich.text import Text

    from fedmerge_peft.data.clients import rows_by_split
    from fedmerge_peft.models.pretrained import model_folder
    from fedmerge_peft.models.quiet import quiet_transformers
    from fedmerge_peft.tasks import make_task
    from fedmerge_peft.tasks.cuts import count_cuts

    own = [[(client, row) for row in client.train[:count]] for client in data.clients]
    turns = chain.from_iterable(zip_longest(*own))
    chosen = [turn for turn in turns if turn is not None][:count]
    with TemporaryDirectory(prefix="fedmerge-") as scratch, quiet_transformers():
        folder = model_folder(recipe.backbone, Path(scratch))
        task = make_task(recipe, data.table, folder)
        shown = task.show(data.table.select([int(row) for _, row in chosen]))
        examples = task.encode(data.table)
    for (client, row), example in zip(chosen, shown, strict=True):
        tokens = example.count()
        facts = [f"{tokens:,} token{'s' * (tokens != 1)}"]
        if (learned := example.count(has_loss=True)) or example.label is None:
            facts.append(f"{learned:,} with a loss")
        if cut := example.count(is_cut=True):
            facts.append(f"{cut:,} cut")
        if example.label is not None:
            facts.append(f"label {example.label}")
        console.print()
        console.print(
            printable(f"row {row}, client {client.name}: {', '.join(facts)}"),
            style="bold",
            markup=False,
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=4, style="dim")
        for segment in _ends(example.segments, _SEGMENTS):
            if isinstance(segment, list):
                tokens = sum(len(part.tokens) for part in segment)
                left_out = f"[{len(segment):,} parts with {tokens:,} tokens not shown]"
                grid.add_row("", "", Text(left_out, style="dim"))
                continue
            mark = _mark(segment)
            grid.add_row(mark, Text(printable(segment.role), style="cyan"), _tokens(segment, mark))
        console.print(grid)
    console.print()
    lines = count_cuts(examples, rows_by_split(data.clients))
    for line in lines or [f"none of {len(examples):,} examples is cut"]:
        console.print(line, markup=False)


def _mark(segment: Segment) -> str:
    return "cut" if segment.is_cut else "loss" if segment.has_loss else ""


def _tokens(segment: Segment, mark: str) -> Text:
    """Return the tokens of a segment, separated by thin lines."""
    from rich.text import Text

    line = Text()
    for number, token in enumerate(_ends(segment.tokens, _TOKENS)):
        line.append("│" if number else "", style="dim")
        if isinstance(token, list):
            line.append(f"[{len(token):,} tokens not shown]", style="dim")
        else:
            line.append(printable(token), style=_STYLES[mark])
    return line


def _ends(items: list[Any], most: int) -> list[Any]:
    """Shorten a list of more than ``most`` items to its first and last ``most`` / 2 items.

    The items between them, which are not shown, become one item: a list. A shorter list is copied.
    """
    if len(items) <= most:
        return [*items]
    begin, end = most // 2, len(items) - most // 2
    return [*items[:begin], items[begin:end], *items[end:]]

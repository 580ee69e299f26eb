"""Tables of a comparison: for the terminal, in Markdown, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from fedmerge_peft.analysis.comparison import REFERENCES, TARGET, Comparison
from fedmerge_peft.util.text import printable, spreadsheet_cell

if TYPE_CHECKING:
    import pandas

_LEGEND = {
    "worst 10 %": "Worst 10 %: mean over the worst tenth of the clients.",
    "spread": "Spread: standard deviation over the clients.",
    "gain over": "Gains are paired by seed; positive is better.",
    "finetuning": (
        "Finetuning: gain from one round of local training, in the last tenth of the rounds."
    ),
    "rounds": (
        "Rounds: rounds completed at the evaluation from which on the mean over all clients stayed "
        "at {} or better."
    ),
    "gap": (
        "Gap: distance between the trained adapter and the one sent next (flora, fedex_lora and "
        "flexlora: between updates)."
    ),
    "MB": "MB: data sent to and received from a client in the whole run.",
}
_OPTIONAL = ("gap", "finetuning", "MB\nup", "MB\ndown", "spread", "seconds", "runs")
"""Columns that are dropped, in this order, until a table fits its width."""


def tables(comparison: Comparison, width: int) -> Iterator[Table | Text]:
    """Yield a table for each setting, and then one legend.

    A table that is wider than ``width`` characters loses optional columns.
    """
    columns: set[str] = set()
    for title, cells in _settings(comparison):
        cells = _fitting(cells, width)
        columns |= set(cells.columns)
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
        for name in cells.columns:
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in cells.itertuples(index=False):
            table.add_row(*map(Text, row))
        yield table
    yield Text(_legend(columns, comparison), style="dim")


def as_csv(comparison: Comparison) -> str:
    """Return ``comparison.methods`` as CSV. Names that begin like a formula get an apostrophe."""
    frame = comparison.methods.map(
        lambda value: spreadsheet_cell(value) if isinstance(value, str) else value
    )
    return str(frame.rename(columns=spreadsheet_cell).to_csv(index=False))


def markdown(comparison: Comparison) -> str:
    """Return the tables and the legend in Markdown, with all columns that are not empty."""
    parts = []
    columns: set[str] = set()
    for title, cells in _settings(comparison):
        columns |= set(cells.columns)
        head = " | ".join(name.replace("\n", " ") for name in cells.columns)
        rows = (
            " | ".join(cell.replace("|", "\\|") for cell in row)
            for row in cells.itertuples(index=False)
        )
        lines = [f"| {head} |", "|---" * len(cells.columns) + "|", *(f"| {row} |" for row in rows)]
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join([*parts, _legend(columns, comparison)]) + "\n"


def _settings(comparison: Comparison) -> Iterator[tuple[Text, pandas.DataFrame]]:
    """Yield title and cells of each setting's table."""
    target = TARGET if comparison.target is None else f"{comparison.target:.3f}"
    for setting, methods in comparison.methods.groupby("setting", sort=False):
        metric = methods["metric"].iloc[0].replace("_", " ")
        yield (
            Text(printable(f"{setting}: final {metric} of the served models")),
            _cells(methods, target),
        )


def _cells(methods: pandas.DataFrame, target: str) -> pandas.DataFrame:
    """Format one setting's methods as text, without empty columns."""
    import pandas

    def text(name: str, form: str) -> list[str]:
        return ["" if math.isnan(value) else format(value, form) for value in methods[name]]

    def with_std(name: str, form: str) -> list[str]:
        return [
            f"{mean} ±{std}" if std else mean
            for mean, std in zip(text(name, form), text(f"{name}_std", "z.3f"), strict=True)
        ]

    columns = {
        "method": [printable(method) for method in methods["method"]],
        "runs": text("runs", "d"),
        "mean": with_std("mean", "z.3f"),
        "worst 10 %": with_std("worst_tenth", "z.3f"),
        "spread": text("spread", "z.3f"),
        **{
            f"gain over\n{reference}": with_std(f"gain_over_{reference}", "+z.3f")
            for reference in REFERENCES
        },
        "finetuning": text("finetuning", "+z.3f"),
        "gap": text("gap", ".3g"),
        f"rounds\nto {target}": [
            "never" if rounds == "inf" else rounds for rounds in text("rounds_to_target", "g")
        ],
        "MB\ndown": [_short(count / 1e6) for count in methods["bytes_down"]],
        "MB\nup": [_short(count / 1e6) for count in methods["bytes_up"]],
        "seconds": [_short(seconds) for seconds in methods["seconds"]],
    }
    return pandas.DataFrame({name: cells for name, cells in columns.items() if any(cells)})


def _fitting(cells: pandas.DataFrame, width: int) -> pandas.DataFrame:
    """Drop optional columns until the table fits the width in characters, or none is left."""
    for name in ("", *_OPTIONAL):
        cells = cells.drop(columns=name, errors="ignore")
        widths = (
            max(len(line) for text in (column, *cells[column]) for line in text.split("\n"))
            for column in cells.columns
        )
        if sum(widths) + len(cells.columns) + 1 <= width:
            break
    return cells


def _legend(columns: set[str], comparison: Comparison) -> str:
    goal = (
        f"the final score of {TARGET} on the same seed"
        if comparison.target is None
        else f"{comparison.target:.3f}"
    )
    lines = [
        line.format(goal)
        for name, line in _LEGEND.items()
        if any(column.startswith(name) for column in columns)
    ]
    return " ".join(["Mean ± standard deviation over runs with different seeds.", *lines])


def _short(value: float) -> str:
    """Format with two significant digits below 1, three below 1000, and no decimals above."""
    return f"{value:.2g}" if value < 0.995 else f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"

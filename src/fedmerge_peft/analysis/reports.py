"""A comparison as people read it: tables for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from fedmerge_peft.analysis.comparison import REFERENCES, TARGET, Comparison
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    import pandas

_LEGEND = {
    "worst 10 %": "Worst 10 %: mean over the worst tenth of the clients.",
    "spread": "Spread: standard deviation over the clients.",
    "gain over": "Gains are paired by seed; positive is better.",
    "finetuning": "Finetuning: what a round's local training gains, in the last tenth of the rounds.",
    "rounds": "Rounds: how many were completed when the mean over all clients was first measured to have reached {}.",
    "gap": "Gap: how far it takes an adapter from what the client is sent next (flora and flexlora: their updates).",
    "MB": "MB: what a client is sent, and sends, in the whole run.",
}
_DISPENSABLE = ("gap", "finetuning", "MB\nup", "MB\ndown", "spread", "seconds", "runs")


def tables(comparison: Comparison, width: int) -> Iterator[Table | Text]:
    """A table for each setting, of as many columns as ``width`` characters take, and a legend."""
    shown: set[str] = set()
    for title, cells in _settings(comparison):
        cells = _fitting(cells, width)
        shown |= set(cells.columns)
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
        for name in cells.columns:
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in cells.itertuples(index=False):
            table.add_row(*map(Text, row))
        yield table
    yield Text(_legend(shown, comparison), style="dim")


def markdown(comparison: Comparison) -> str:
    """The same in Markdown, with all columns."""
    parts = []
    shown: set[str] = set()
    for title, cells in _settings(comparison):
        shown |= set(cells.columns)
        head = " | ".join(name.replace("\n", " ") for name in cells.columns)
        rows = (
            " | ".join(cell.replace("|", "\\|") for cell in row)
            for row in cells.itertuples(index=False)
        )
        lines = [f"| {head} |", "|---" * len(cells.columns) + "|", *(f"| {row} |" for row in rows)]
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join([*parts, _legend(shown, comparison)]) + "\n"


def _settings(comparison: Comparison) -> Iterator[tuple[Text, pandas.DataFrame]]:
    """For each setting a title, and the cells of its table."""
    target = TARGET if comparison.target is None else f"{comparison.target:.3f}"
    for setting, methods in comparison.methods.groupby("setting", sort=False):
        title = f"{setting}: final {methods['metric'].iloc[0].replace('_', ' ')} of what clients are served with"
        yield Text(printable(title)), _cells(methods, target)


def _cells(methods: pandas.DataFrame, target: str) -> pandas.DataFrame:
    """One setting's methods as texts, without columns that have nothing to say."""
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
    """The columns that stand beside each other in so many characters, the dispensable ones dropped one by one."""
    for name in ("", *_DISPENSABLE):
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
        f"what {TARGET} ends with on the same seed"
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
    """Two digits or three, and all that stand before the point."""
    return f"{value:.2g}" if value < 0.995 else f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"

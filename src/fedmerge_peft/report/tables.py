"""Rows of the page's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge_peft.analysis.sharing import known_groups
from fedmerge_peft.report.cost_figures import seconds, traffic
from fedmerge_peft.report.methods import Setting, readable
from fedmerge_peft.tasks.metrics import greater_score_is_better

_MAX_METHODS = 4
"""Limit on the methods in the table of clients."""


@dataclass(frozen=True)
class Column:
    """A column by which a table can be sorted."""

    name: str
    kind: str = "number"
    """Kind of values: ``number`` or ``text``."""


@dataclass(frozen=True)
class Cell:
    """A cell: the text that it shows, and the value by which rows are sorted."""

    text: str
    value: str

    @classmethod
    def of(cls, value: float | str, *, signed: bool = False) -> Cell:
        """Return the cell of a number or text. ``signed`` adds a plus sign to positive numbers."""
        if isinstance(value, str):
            return cls(value, value)
        sign = "+" if signed and value > 0 else ""
        shown = (sign + number(value)).replace("-", "\u2212")  # minus
        return cls(shown, "" if math.isnan(value) else str(float(value)))


def client_table(setting: Setting) -> tuple[list[Column], list[list[Cell]]]:
    """Return the columns and one row per client, the worst score of the first method first.

    A row has the client's numbers of examples, its scores under at most four methods and, if there
    is a reference, the gain of the first method over it. Clients without a score come last. If no
    method has scores, there are neither columns nor rows.
    """
    metric = setting.metric
    if metric is None:
        return [], []
    first, reference = setting.methods[0], setting.reference
    methods = [first, *setting.rivals][:_MAX_METHODS]
    clients, names = first.run.clients, setting.clients
    values = {method.name: method.values(metric, names) for method in methods}
    own = values.get(first.name, [math.nan] * len(names))
    sign = 1 if setting.greater_is_better else -1
    trained: dict[str, Any] = next(
        (
            record["finetuned"]["clients"]
            for record in reversed(first.run.records)
            if record["finetuned"]
        ),
        {},
    )
    trained = trained if len(setting.runs) == 1 else {}
    weights = first.run.weights.to_numpy() if first.run.records else np.zeros((len(names), 0))
    merged = weights.shape[1] > 1 and len(setting.runs) == 1
    groups = known_groups(first.run)
    columns = [
        Column("client", "text"),
        *([Column("group", "text")] if groups else []),
        Column("train"),
        Column("test"),
        *(Column(method.name) for method in methods),
        *([Column(f"gain over {reference.name}")] if reference else []),
        *([Column("finetuned")] if trained else []),
        *([Column("adapter"), Column("weight")] if merged else []),
    ]
    rows = []
    for row, name in enumerate(names):
        cells = [Cell.of(name), *([Cell.of(groups[row])] if groups else [])]
        cells += [_count(clients[split].iloc[row]) for split in ("train", "test")]
        cells += [Cell.of(values[method.name][row]) for method in methods]
        if reference is not None:
            gain = sign * (own[row] - values[reference.name][row])
            cells.append(Cell.of(gain, signed=True))
        if trained:
            cells.append(Cell.of(trained.get(name, {}).get(metric, math.nan)))
        if merged:
            cells += [_count(weights[row].argmax()), Cell.of(float(weights[row].max()))]
        rows.append((sign * own[row], cells))
    rows.sort(key=lambda row: (math.isnan(row[0]), row[0]))
    return columns, [cells for _, cells in rows]


def run_table(setting: Setting) -> tuple[list[Column], list[list[Cell]]]:
    """Return the columns, and one row per method with its mean and worst score and its costs."""
    score = readable(setting.metric or "score")
    columns = [
        Column("method", "text"),
        Column(f"mean {score}"),
        Column("worst client"),
        Column("MB sent per client"),
        Column("seconds"),
    ]
    rows = []
    for method in setting.methods:
        scores = method.scores
        known = scores is not None and scores["metric"] == setting.metric
        results = [
            float(scores[key]) if known and scores else math.nan
            for key in ("mean", "worst_client_score")
        ]
        costs = [traffic(method, "bytes_down"), seconds(method)]
        rows.append([Cell.of(method.name), *map(Cell.of, [*results, *costs])])
    return columns, rows


def worst_percentile(metric: str) -> int:
    """Return the percentile that marks poor scores: 10, or 90 if lower scores are better."""
    return 10 if greater_score_is_better(metric) else 90


def _count(value: Any) -> Cell:
    return Cell(f"{int(value):,}", str(int(value)))


def number(value: float) -> str:
    """Format a number with up to three decimals, fewer for larger numbers.

    Infinity becomes ∞; nan and -infinity become a dash.
    """
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    return (
        f"{value:.3f}"
        if abs(value) < 1
        else f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.1f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )

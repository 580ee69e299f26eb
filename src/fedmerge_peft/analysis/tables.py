"""Terminal tables of a run: final scores and merging weights."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from fedmerge_peft.analysis.sharing import known_groups
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_is_better
from fedmerge_peft.util.text import printable

_SHADES = " ░▒▓█"
_MAX_SHADED = 6
"""Limit on adapters for shaded weights. With more adapters, weights are plain percentages."""
_MAX_ADAPTERS = 15
"""Limit on the adapters shown, one column each."""


def scores_table(run: RunDirectory, most: int = 40) -> Table:
    """Return a table of each client's final score under the run's strategy and its baselines.

    A client without a score, such as one without test examples, has a dash.

    Args:
        run: A finished run.
        most: Largest number of clients with a row of their own.
    """
    runs: Mapping[str, RunDirectory] = {run.recipe.strategy.name: run, **run.baselines}
    final = {name: method.summary["final"]["served"] for name, method in runs.items()}
    metric = final[run.recipe.strategy.name]["metric"]
    best_of = max if greater_is_better(run.recipe.task.metrics[0]) else min
    table = Table(
        title=f"final {metric.replace('_', ' ')} of the served models",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    groups = known_groups(run)
    table.add_column("client")
    if groups:
        table.add_column("group")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    for name in runs:
        table.add_column(name, justify="right")

    def cells(values: list[float | None]) -> list[str]:
        known = [value for value in values if value is not None]
        return [
            "–"
            if value is None
            else f"[bold]{value:.3f}[/]"
            if value == best_of(known) and len(values) > 1
            else f"{value:.3f}"
            for value in values
        ]

    clients = run.clients
    for row, (client_name, client) in enumerate(clients.head(most).iterrows()):
        values = [scores["clients"].get(client_name, {}).get(metric) for scores in final.values()]
        table.add_row(
            _plain(client_name),
            *([_plain(groups[row])] if groups else []),
            str(client["train"]),
            str(client["test"]),
            *cells(values),
        )
    if len(clients) > most:
        table.add_row(f"... and {len(clients) - most} more")
    table.add_section()
    empty = [""] * (2 + bool(groups))
    table.add_row("mean", *empty, *cells([scores["mean"] for scores in final.values()]))
    worst = [scores["worst_client_score"] for scores in final.values()]
    table.add_row("worst client", *empty, *cells(worst))
    return table


def weights_table(run: RunDirectory, most: int = 40) -> Table:
    """Return a table of the merging weights π, in percent if there are many adapters.

    Args:
        run: A run with at least one finished round.
        most: Largest number of clients with a row of their own.
    """
    weights = run.weights
    many = weights.shape[1] > _MAX_SHADED
    unit = ", percent" if many else ""
    table = Table(
        title=f"learned merging weights: clients × adapters{unit}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.padding = (0, 0) if many else (0, 1)
    table.add_column("client", no_wrap=True)
    for adapter in weights.columns[:_MAX_ADAPTERS]:
        table.add_column(str(adapter), justify="right", no_wrap=True, min_width=3 if many else None)
    for name, row in weights.head(most).iterrows():
        table.add_row(_plain(name), *(_shaded(float(value), many) for value in row[:_MAX_ADAPTERS]))
    if len(weights) > most:
        table.add_row(f"... and {len(weights) - most} more")
    if weights.shape[1] > _MAX_ADAPTERS:
        table.caption = f"... and {weights.shape[1] - _MAX_ADAPTERS} more adapters"
    return table


def _plain(name: object) -> Text:
    """Return a name from the data as plain text: markup has no effect, and controls are escaped."""
    return Text(printable(str(name)))


def _shaded(weight: float, many: bool) -> Text:
    text = f"{100 * weight:.0f}" if many else f"{_SHADES[min(4, int(weight * 5))]} {weight:.2f}"
    return Text(text, style="dim" if weight < 0.1 else "")

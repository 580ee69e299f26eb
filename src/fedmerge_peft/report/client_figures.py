"""Figures of every client's scores under the methods."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fedmerge_peft.analysis.intervals import LEVEL, score_intervals
from fedmerge_peft.plotting.specs import Dumbbell, MethodScores, Spread
from fedmerge_peft.plotting.svg_clients import MAX_CLIENTS
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.methods import Method, Setting, readable

_MAX_METHODS = 4
"""Limit on the methods of a dumbbell chart."""
_MAX_ROWS = 30
"""Limit on the rows of a single chart; by default, more clients are divided into two charts."""
_MAX_INTERVALS = 160
"""Limit on clients for charts with intervals."""
_CERTAIN = 100
"""Number of examples above which a client's score has no interval."""


def client_figures(setting: Setting, parts: int | None = None) -> Iterator[Figure]:
    """Yield a chart with one row per method, then charts with one row per client.

    Both show each client's scores. Without scores, there is no chart. Without a second method with
    scores, there is only the first chart.

    Args:
        setting: The setting.
        parts: Number of charts with one row per client. Default: one, or two for more than
            ``_MAX_ROWS`` clients.
    """
    metric = setting.metric
    if metric is None:
        return
    scores = [
        MethodScores(
            method.name,
            method.values(metric, setting.clients),
            method.style,
            method.mean(metric),
        )
        for method in setting.methods
        if method.scores
    ]
    yield Figure(
        "clients",
        f"{_title(metric)} of all clients, by method",
        Spread(scores, readable(metric), setting.greater_is_better),
        "Each dot is a client, and the line is their mean. Dots are shifted up and down only to "
        "separate them.",
    )
    if setting.reference is not None:
        yield from _dumbbells(setting, metric, setting.reference, parts)


def answer(setting: Setting) -> str:
    """Return text: for how many clients the first method is better than each other method.

    At most ``_MAX_METHODS`` other methods are named.
    """
    metric = setting.metric
    if metric is None:
        return (
            "There are no scores: no round has been evaluated yet, no client has test or "
            "validation examples, or private sites send none."
        )
    first = setting.methods[0]
    others = setting.rivals[:_MAX_METHODS]
    if not others:
        recipe = first.run.recipe
        if any(baseline.name != recipe.strategy.name for baseline in recipe.baselines):
            return f"The baselines that {first.name} is compared with have no scores yet."
        return (
            f"There are no scores of another method to compare {first.name} with. Run the recipe "
            f"with baselines=[local, fedavg] to see which clients {first.name} helps."
        )
    own = np.array(first.values(metric, setting.clients))
    sign = 1 if setting.greater_is_better else -1
    parts = []
    for method in others:
        gains = sign * (own - np.array(method.values(metric, setting.clients)))
        known = int(np.isfinite(gains).sum())
        equal = int((gains == 0).sum())
        ties = f" ({equal} equal)" if equal else ""
        clients = f"{known} client{'s' * (known != 1)}"
        parts.append(f"than {method.name} for {int((gains > 0).sum())} of {clients}{ties}")
    return f"{first.name} is better {_enumerated(parts)}."


def _enumerated(parts: list[str]) -> str:
    return ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _dumbbells(
    setting: Setting, metric: str, reference: Method, count: int | None
) -> Iterator[Figure]:
    """Yield charts of the clients, in the order of their gain over the reference."""
    first, clients = setting.methods[0], setting.clients
    chosen = [first, *setting.rivals][:_MAX_METHODS]
    values = {method.name: np.array(method.values(metric, clients)) for method in chosen}
    sign = 1 if setting.greater_is_better else -1
    own = sign * values[first.name]
    gains = own - sign * values[reference.name]
    order = np.lexsort((-own, -gains))  # nan comes last
    order = order[np.isfinite(gains[order])]
    if not len(order):
        return
    parts = np.array_split(order, count or (2 if len(order) > _MAX_ROWS else 1))
    spans = _intervals(first, metric) if len(order) <= _MAX_INTERVALS else {}
    caption = (
        f"Clients in the order of their gain over {reference.name}. The bar has the color of the "
        f"better of {first.name} and {reference.name}."
    )
    if spans:
        caption += (
            f" Thin lines are {100 * LEVEL:.0f} % intervals of {first.name} (Wilson), for clients "
            f"with at most {_CERTAIN} {metric.partition('_')[0]} examples."
        )
    if (step := math.ceil(len(parts[0]) / MAX_CLIENTS)) > 1:
        caption += f" One of every {step} clients is shown."
    if len(setting.methods) > len(chosen):
        caption += " The chart of all clients also shows the other methods."
    none = (math.nan, math.nan)
    finite = [value for scores in values.values() for value in scores if math.isfinite(value)]
    finite += [limit for span in spans.values() for limit in span]
    place = 1
    for number, rows in enumerate(parts):
        names = [clients[row] for row in rows]
        place, begin = place + len(rows), place
        yield Figure(
            "gains" if number == 0 else "gains-2",
            f"{_title(metric)} of each client"
            + (f", {begin} to {place - 1} by gain" if len(parts) > 1 else ""),
            Dumbbell(
                names,
                [
                    MethodScores(method.name, values[method.name][rows].tolist(), method.style)
                    for method in chosen
                ],
                readable(metric),
                setting.greater_is_better,
                [spans.get(name, none) for name in names] if spans else None,
                [min(finite), max(finite)],
            ),
            caption if number == len(parts) - 1 else "",
        )


def _intervals(method: Method, metric: str) -> dict[str, tuple[float, float]]:
    """Return the intervals of clients with at most ``_CERTAIN`` examples."""
    if method.scores is None or method.scores["metric"] != metric:
        return {}
    sizes = method.run.clients[metric.partition("_")[0]]
    intervals = score_intervals(method.run, method.scores) or {}
    return {client: span for client, span in intervals.items() if sizes[client] <= _CERTAIN}


def _title(metric: str) -> str:
    name = readable(metric)
    return name[:1].upper() + name[1:]

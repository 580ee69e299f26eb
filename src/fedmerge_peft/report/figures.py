"""The figures of a report, from one run and its baselines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fedmerge_peft.analysis import local_global_gap
from fedmerge_peft.plotting import svg
from fedmerge_peft.plotting.specs import Bars, Drawing, Heat, Line, Lines, Strip
from fedmerge_peft.report.advice import percentile
from fedmerge_peft.runs.directory import RunDirectory

_MAX_PAIRED = 1500
"""Limit on clients for the figure of pairwise similarities."""
_MAX_CELLS = 60
"""Limit on rows and columns of that figure."""
_MAX_ROUNDS = 6
"""Limit on rounds in the figure of π over the rounds."""


@dataclass(frozen=True)
class Figure:
    """A figure with title and caption."""

    name: str
    """Name of its files, without suffix."""
    title: str
    drawing: Drawing
    caption: str

    @cached_property
    def markup(self) -> Markup:
        """An ``svg`` element in the page's colors; empty if there is nothing to draw."""
        return svg.draw(self.drawing)


def figures(run: RunDirectory) -> list[Figure]:
    """Return all figures for which the run has data."""
    order = similar_order(run.weights.to_numpy()) if run.records else np.arange(len(run.clients))
    candidates = [
        *_scores(run),
        *_weights(run, order),
        *_labels(run, order),
        *_similarity(run, order),
        *_adapters(run),
        *_gap(run),
        *_costs(run),
    ]
    return [figure for figure in candidates if figure.markup]


def similar_order(weights: NDArray[Any]) -> NDArray[np.int64]:
    """Return an order ``(m,)`` of the rows of π ``(m, d)`` in which similar rows are adjacent.

    Rows are sorted by their largest adapter, then by their second largest, then by decreasing
    weight of the largest.
    """
    ranked = np.argsort(-weights, axis=1, kind="stable")
    second = ranked[:, min(1, weights.shape[1] - 1)]
    return np.lexsort((-weights.max(axis=1), second, ranked[:, 0])).astype(np.int64)


def _scores(run: RunDirectory) -> Iterator[Figure]:
    series = []
    served = _points(run)
    if not served:
        return
    metric = served[0][1]["metric"].replace("_", " ")
    x = [completed for completed, _ in served]
    means = [scores["mean"] for _, scores in served]
    bands = [[percentile(scores, percent) for _, scores in served] for percent in (10, 90)]
    series.append(Line("served", x, means, bands[0], bands[1], 0))
    finetuned = [
        (record["round"] - 1, record["finetuned"]["mean"])
        for record in run.records
        if record["finetuned"]
    ]
    if finetuned:
        rounds, values = zip(*finetuned, strict=True)
        series.append(Line("finetuned", rounds, values, style=1))
    for style, (name, baseline) in enumerate(run.baselines.items(), start=2):
        if points := _points(baseline):
            series.append(
                Line(
                    name,
                    [completed for completed, _ in points],
                    [scores["mean"] for _, scores in points],
                    style=min(style, 5),
                )
            )
    bounded = not served[0][1]["metric"].endswith(("perplexity", "loss", "correlation"))
    yield Figure(
        "scores",
        f"{metric[:1].upper()}{metric[1:]}, mean over clients, by round",
        Lines(
            series,
            x="rounds completed",
            y=metric,
            floor=0 if bounded else None,
            ceiling=1 if bounded else None,
        ),
        "The band covers the middle 80 % of the clients. “finetuned” is the score after one more "
        "round of local training. If the two lines are close, clients need no finetuning."
        + (" The other lines are the baselines." if len(series) > 2 else ""),
    )


def _points(run: RunDirectory) -> list[tuple[int, dict[str, Any]]]:
    """Return pairs of rounds completed and the scores served at that time."""
    points = [(record["round"] - 1, record["served"]) for record in run.records if record["served"]]
    if (run.path / "summary.json").is_file() and (scores := run.last_scores):
        points.append((len(run.records), scores))
    return points


def _weights(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    weights = run.weights if run.records else None
    if weights is None or weights.shape[1] < 2:
        return
    names = [str(weights.index[number]) for number in order]
    averaged = (
        f" With {len(names)} clients, adjacent rows are averaged."
        if len(names) > svg.MAX_ROWS
        else ""
    )
    yield Figure(
        "weights",
        "Merging weights π of each client",
        Heat(
            weights.to_numpy()[order],
            rows=names,
            columns=[str(column) for column in weights.columns],
            x="adapter (number)",
            label="weight π (share of the client)",
        ),
        f"One row per client; clients with similar weights are adjacent.{averaged}",
    )
    by_round = [
        (number, each)
        for number, each in run.weights_by_round()
        if each.shape[1] == weights.shape[1]  # not those of before the grouping
    ]
    chosen = np.unique(np.linspace(0, len(by_round) - 1, _MAX_ROUNDS).round().astype(int))
    if run.recipe.strategy.learned_merging and len(chosen) > 1:
        panels = [
            (f"round {by_round[number][0]}", by_round[number][1].numpy()[order])
            for number in chosen
        ]
        yield Figure(
            "weights-by-round",
            "Merging weights π over the rounds",
            Strip(
                panels,
                x="adapters, by number",
                y="clients, in the order of their weights",
                label="merging weight π (share)",
            ),
            "Rows are clients in the order of the figure above; columns are adapters. A darker "
            "color is a larger weight.",
        )


def _labels(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    counts = run.label_counts
    if counts is None:
        return
    sorted_counts = counts.to_numpy()[order].astype(float)
    shares = sorted_counts / sorted_counts.sum(axis=1, keepdims=True).clip(1)
    yield Figure(
        "labels",
        "Label distribution of each client",
        Heat(
            shares,
            rows=[str(counts.index[number]) for number in order],
            columns=[str(column) for column in counts.columns],
            x="label",
            label="share of the client's training examples",
            top=float(min(1.0, math.ceil(10 * shares.max(initial=0.1)) / 10)),
        ),
        "Clients are in the order of their merging weights. If the weights follow the labels, both "
        "figures show the same blocks. Clients may also use the same label for different things, "
        "which this figure does not show.",
    )


def _similarity(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    counts = run.label_counts
    if counts is None or not run.records or run.weights.shape[1] < 2 or len(order) > _MAX_PAIRED:
        return
    sorted_counts = counts.to_numpy()[order].astype(float)
    distributions = {
        "by merging weights": run.weights.to_numpy()[order],
        "by labels": sorted_counts / sorted_counts.sum(axis=1, keepdims=True).clip(1),
    }
    panels = [(title, _coarse(similarity(rows))) for title, rows in distributions.items()]
    yield Figure(
        "similarity",
        "Similarity of clients: by learned weights, and by labels",
        Strip(
            panels,
            x="clients, in the order of their merging weights",
            y="clients, in the same order",
            label="similarity, 1 − ½ ‖p − q‖₁",
        ),
        "Each cell is a pair of clients; full color is a similarity of 1. The server "
        "had no access to the labels on the right. Blocks that appear only on the left are clients "
        "that behave alike although their labels differ.",
    )


def similarity(rows: NDArray[Any]) -> NDArray[Any]:
    """Return 1 − ½ ‖p_i − p_j‖₁ for all pairs of rows.

    Args:
        rows: Distributions ``(m, k)``; each row sums to 1.

    Returns:
        Similarities ``(m, m)``: 1 for equal rows, 0 for rows with disjoint support.
    """
    return np.stack([1 - np.abs(rows - row).sum(axis=1) / 2 for row in rows])


def _coarse(square: NDArray[Any]) -> NDArray[Any]:
    """Average to at most 60 rows and columns, which limits the size of the page."""
    across = svg.binned(square, [""] * len(square), _MAX_CELLS)[0].T
    return svg.binned(across, [""] * len(across), _MAX_CELLS)[0].T


def _adapters(run: RunDirectory) -> Iterator[Figure]:
    records = [record for record in run.records if record["adapter_mass"]]
    if not records or len(records[0]["adapter_mass"]) < 2:
        return
    mass = np.array([record["adapter_mass"] for record in records]).T
    yield Figure(
        "mass",
        "Mass: share of the clients' weight on each adapter",
        Heat(
            mass,
            rows=[f"adapter {number}" for number in range(len(mass))],
            columns=[str(record["round"]) for record in records],
            x="round",
            label="share of the clients' weight",
            top=float(mass.max()),
        ),
        f"A uniform share is {1 / len(mass):.2f}. A row that fades is an adapter that no client "
        "uses.",
    )
    rounds = [record["round"] for record in records]
    yield Figure(
        "entropy",
        "Entropy of the merging weights, by round",
        Lines(
            [Line("entropy", rounds, [record["weights_entropy"] for record in records])],
            x="round",
            y="entropy of π, in units of log d",
            floor=0,
            ceiling=1,
        ),
        "1: every client weights all adapters equally. 0: every client uses a single adapter. Mean "
        "over clients, in units of log d.",
    )


def _gap(run: RunDirectory) -> Iterator[Figure]:
    gap = local_global_gap(run)
    if not len(gap) or gap["distance"].isna().all():
        return
    gap = gap[gap["distance"].notna()]
    yield Figure(
        "gap",
        "Local-global gap: distance between trained and next served adapters",
        Lines(
            [
                Line(
                    "gap",
                    [int(number) for number in gap.index],
                    gap["distance"].astype(float).tolist(),
                )
            ],
            x="round",
            y="distance ‖trained − sent next‖₂",
            floor=0,
        ),
        "‖θ trained − θ sent next‖₂ between adapter parameters (flora, fedex_lora and flexlora: "
        "between weight updates), mean over clients. A smaller gap means that merging preserves "
        "more of a client's training.",
    )


def _costs(run: RunDirectory) -> Iterator[Figure]:
    runs = {run.recipe.strategy.name: run, **run.baselines}
    records = {name: method.records for name, method in runs.items() if method.records}
    if not records:
        return
    clients = len(run.clients)
    for direction, text, key in (
        ("down", "sent to a client", "bytes_down"),
        ("up", "received from a client", "bytes_up"),
    ):
        megabytes = [
            sum(record[key] for record in rounds) / clients / 1e6 for rounds in records.values()
        ]
        yield Figure(
            f"traffic-{direction}",
            f"Traffic: data {text} in the whole run",
            Bars(list(records), megabytes, unit="MB", label=f"data {text} (MB)"),
            "Adapters in float32, mean over clients.",
        )
    seconds = [sum(record["seconds"] for record in rounds) for rounds in records.values()]
    yield Figure(
        "time",
        "Time: wall clock of all rounds",
        Bars(list(records), seconds, unit="s", label="wall clock of all rounds (s)"),
        "Evaluation included; all clients trained on one machine.",
    )

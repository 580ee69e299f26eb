"""The figures of a report, each from one run and its baselines."""

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
from fedmerge_peft.report.advice import final, percentile
from fedmerge_peft.runs.directory import RunDirectory

_MOST_PAIRED = 1500
"""Clients of which pairs are drawn."""
_MOST_CELLS = 60
"""Lines of a picture of pairs."""
_MOST_ROUNDS = 6
"""Rounds of which π is drawn."""


@dataclass(frozen=True)
class Figure:
    """A picture with its title and a sentence on how to read it."""

    name: str
    """Of its files."""
    title: str
    drawing: Drawing
    reading: str

    @cached_property
    def picture(self) -> Markup:
        """An ``svg`` element in the colours of the page; empty where there is nothing to draw."""
        return svg.draw(self.drawing)


def figures(run: RunDirectory) -> list[Figure]:
    """All figures that the run's files allow; those without numbers are left out."""
    order = similar_order(run.weights.to_numpy()) if run.records else np.arange(len(run.clients))
    found = [
        *_scores(run),
        *_weights(run, order),
        *_labels(run, order),
        *_similarity(run, order),
        *_adapters(run),
        *_gap(run),
        *_costs(run),
    ]
    return [figure for figure in found if figure.picture]


def similar_order(weights: NDArray[Any]) -> NDArray[np.int64]:
    """An order ``(m,)`` of the rows of π ``(m, d)`` in which those who are alike stand together: by their first adapter, then their second.

    Within that, those who are more of the first come first.
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
    tuned = [
        (record["round"] - 1, record["finetuned"]["mean"])
        for record in run.records
        if record["finetuned"]
    ]
    if tuned:
        series.append(
            Line("finetuned", [at for at, _ in tuned], [mean for _, mean in tuned], style=1)
        )
    for style, (name, other) in enumerate(run.baselines.items(), start=2):
        if points := _points(other):
            series.append(
                Line(
                    name,
                    [at for at, _ in points],
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
        "The band holds the middle 80 % of the clients. “finetuned” is what a round of local training makes of what is served: "
        "the closer the two lines, the less a client needs it. "
        + ("The other lines are what the baselines serve." if len(series) > 2 else ""),
    )


def _points(run: RunDirectory) -> list[tuple[int, dict[str, Any]]]:
    """Rounds completed, and the scores of what was served then."""
    points = [(record["round"] - 1, record["served"]) for record in run.records if record["served"]]
    if (run.path / "summary.json").is_file() and (scores := final(run)):
        points.append((len(run.records), scores))
    return points


def _weights(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    weights = run.weights if run.records else None
    if weights is None or weights.shape[1] < 2:
        return
    names = [str(weights.index[number]) for number in order]
    crowd = (
        f" With {len(names)} clients, neighbours share a line."
        if len(names) > svg.MOST_ROWS
        else ""
    )
    yield Figure(
        "weights",
        "Merging weights π: who is made of which adapters",
        Heat(
            weights.to_numpy()[order],
            rows=names,
            columns=[str(column) for column in weights.columns],
            x="adapter (number)",
            label="weight π (share of the client)",
        ),
        f"A line a client; clients with like weights stand together.{crowd}",
    )
    by_round = list(run.weights_by_round())
    chosen = np.unique(np.linspace(0, len(by_round) - 1, _MOST_ROUNDS).round().astype(int))
    if run.recipe.strategy.name == "fedmerge" and len(chosen) > 1:
        pictures = [
            (f"round {by_round[number][0]}", by_round[number][1].numpy()[order])
            for number in chosen
        ]
        yield Figure(
            "weights-by-round",
            "Merging weights π as they moved over the rounds",
            Strip(
                pictures,
                x="adapters, by number",
                y="clients, in the order of their weights",
                label="merging weight π (share)",
            ),
            "Clients from top to bottom in the order of the figure above, adapters from left to right, a stronger colour for more weight.",
        )


def _labels(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    counts = run.label_counts
    if counts is None:
        return
    held = counts.to_numpy()[order].astype(float)
    shares = held / held.sum(axis=1, keepdims=True).clip(1)
    yield Figure(
        "labels",
        "Labels: who holds what",
        Heat(
            shares,
            rows=[str(counts.index[number]) for number in order],
            columns=[str(column) for column in counts.columns],
            x="label",
            label="share of the client's training examples",
            top=float(min(1.0, math.ceil(10 * shares.max(initial=0.1)) / 10)),
        ),
        "Clients in the order of their merging weights: where weights follow labels, blocks here are blocks there. "
        "Clients may also differ in what they mean by a label, which this figure does not show.",
    )


def _similarity(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    counts = run.label_counts
    if counts is None or not run.records or run.weights.shape[1] < 2 or len(order) > _MOST_PAIRED:
        return
    held = counts.to_numpy()[order].astype(float)
    found = {
        "by merging weights": run.weights.to_numpy()[order],
        "by labels": held / held.sum(axis=1, keepdims=True).clip(1),
    }
    pictures = [(title, _coarse(alike(rows))) for title, rows in found.items()]
    yield Figure(
        "similarity",
        "Similarity of clients: learned, and by their labels",
        Strip(
            pictures,
            x="clients, in the order of their merging weights",
            y="clients, in the same order",
            label="similarity, 1 − ½ ‖p − q‖₁",
        ),
        "Clients against clients, in the order of their merging weights; 1 − ½ ‖p − q‖₁, from none to full colour. The server never saw "
        "the right picture. Where the left has blocks that the right has not, clients are alike in something else than their labels.",
    )


def alike(rows: NDArray[Any]) -> NDArray[Any]:
    """1 − ½ ‖p_i − p_j‖₁ of all pairs ``(m, m)`` of rows ``(m, k)`` that sum to 1: 1 for equals, 0 for nothing in common."""
    return np.stack([1 - np.abs(rows - row).sum(axis=1) / 2 for row in rows])


def _coarse(square: NDArray[Any]) -> NDArray[Any]:
    """At most 60 lines and columns, as the page keeps a cell for each."""
    across = svg.binned(square, [""] * len(square), _MOST_CELLS)[0].T
    return svg.binned(across, [""] * len(across), _MOST_CELLS)[0].T


def _adapters(run: RunDirectory) -> Iterator[Figure]:
    learned = [record for record in run.records if record["adapter_mass"]]
    if not learned or len(learned[0]["adapter_mass"]) < 2:
        return
    mass = np.array([record["adapter_mass"] for record in learned]).T
    yield Figure(
        "mass",
        "Mass: how much of all clients each adapter is",
        Heat(
            mass,
            rows=[f"adapter {number}" for number in range(len(mass))],
            columns=[str(record["round"]) for record in learned],
            x="round",
            label="share of the clients' weight",
            top=float(mass.max()),
        ),
        f"An even share would be {1 / len(mass):.2f}. A line that fades is an adapter that nobody uses.",
    )
    rounds = [record["round"] for record in learned]
    yield Figure(
        "entropy",
        "Entropy of the merging weights, by round",
        Lines(
            [Line("entropy", rounds, [record["weights_entropy"] for record in learned])],
            x="round",
            y="entropy of π, in units of log d",
            floor=0,
            ceiling=1,
        ),
        "1: every client is made of all adapters alike. 0: every client has one adapter of its own. In units of log d, mean over clients.",
    )


def _gap(run: RunDirectory) -> Iterator[Figure]:
    gap = local_global_gap(run)
    if not len(gap) or gap["distance"].isna().all():
        return
    gap = gap[gap["distance"].notna()]
    yield Figure(
        "gap",
        "Local-global gap: what clients trained against what they get next",
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
        "‖θ trained − θ sent next‖₂ in parameters (flora and flexlora: in updates of the weights), mean over clients. "
        "The smaller, the less of a client's training is lost in merging.",
    )


def _costs(run: RunDirectory) -> Iterator[Figure]:
    runs = {run.recipe.strategy.name: run, **run.baselines}
    runs = {name: each for name, each in runs.items() if each.records}
    if not runs:
        return
    clients = len(run.clients)
    for direction, way, key in (
        ("down", "a client is sent", "bytes_down"),
        ("up", "a client sends back", "bytes_up"),
    ):
        megabytes = [
            sum(record[key] for record in each.records) / clients / 1e6 for each in runs.values()
        ]
        yield Figure(
            f"traffic-{direction}",
            f"Traffic: what {way} in the whole run",
            Bars(list(runs), megabytes, unit="MB", label=f"what {way} (MB)"),
            "Adapters as float32, mean over clients.",
        )
    seconds = [sum(record["seconds"] for record in each.records) for each in runs.values()]
    yield Figure(
        "time",
        "Time: wall clock of all rounds",
        Bars(list(runs), seconds, unit="s", label="wall clock of all rounds (s)"),
        "Measuring included; clients trained on one machine.",
    )

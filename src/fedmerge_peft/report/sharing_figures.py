"""Sharing of adapters: merging weights, and the similarity of clients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.analysis.sharing import known_groups, sharing
from fedmerge_peft.plotting.specs import Heat, Line, Lines, Strip
from fedmerge_peft.plotting.svg_heat import MAX_ROWS, binned, binned_groups
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.methods import Method
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.util.text import count_of

_MAX_PAIRED = 1500
"""Limit on clients for figures of pairwise similarities."""
_MAX_CELLS = 60
"""Limit on rows and columns of figures of pairwise similarities."""
_MAX_ROUNDS = 6
"""Limit on rounds in the figure of π over the rounds."""


def sharing_figures(run: RunDirectory) -> Iterator[Figure]:
    """Yield figures of π and of the clients' labels.

    Yield none if the run has a single adapter, or no completed round.
    """
    if not run.records or run.weights.shape[1] < 2:
        return
    weights = run.weights.to_numpy()
    groups = known_groups(run)
    order = similar_order(weights)
    if groups:  # keep each group together; the group with the first row comes first
        first = {group: place for place, group in reversed([*enumerate(groups[i] for i in order)])}
        order = np.array(sorted(order, key=lambda row: first[groups[row]]))
        groups = [groups[row] for row in order]
    yield _weights(run, order, groups)
    yield from _similarities(run, order, groups)
    yield from _by_round(run, order)
    yield from _labels(run, order, groups)


def answer(method: Method) -> str:
    """Return sentences on the sharing of adapters between clients."""
    run = method.run
    if not run.records:
        return "No round is done yet."
    weights = run.weights.to_numpy()
    adapters = weights.shape[1]
    if adapters < 2:
        return f"With {method.name}, the soup has one adapter for all clients."
    used = int((weights.mean(axis=0) >= 0.5 / adapters).sum())
    most = int((weights.max(axis=1) > 0.5).sum())
    have = "has more than half of its" if most == 1 else "have more than half of their"
    sentences = [
        f"{used} of {adapters} adapters {'is' if used == 1 else 'are'} in use. "
        f"{most} of {count_of(len(weights), 'client')} {have} weight on one adapter."
    ]
    if blocks := run.recipe.strategy.merged_blocks:
        sentences.append(
            f"Weights differ between blocks of the adapter ({blocks}). This page shows their means "
            "over all parameters."
        )
    if known_groups(run):
        table = sharing(run)
        apart = int(((table["share"] == 1) & (table["others"] == "")).sum())
        have = "has its own main adapter" if apart == 1 else "have main adapters of their own"
        sentences.append(
            f"{apart} of {count_of(len(table), 'group')} {have}: all clients of the group use it "
            "most, and it is the main adapter of no other group."
        )
        together = table[table["others"] != ""].groupby("adapter").groups.values()
        shared = [" with ".join(map(str, groups)) for groups in together]
        if shared:
            more = f", and {len(shared) - 3} more sets" if len(shared) > 3 else ""
            sentences.append(f"Sharing a main adapter: {'; '.join(shared[:3])}{more}.")
    return " ".join(sentences)


def similar_order(weights: NDArray[Any]) -> NDArray[np.int64]:
    """Return an order ``(m,)`` of the rows of π ``(m, d)`` in which similar rows are adjacent.

    Rows are sorted by the number of the adapter with their largest weight, then by the number of
    the adapter with their second largest weight. Ties are sorted by the largest weight, in
    descending order.
    """
    ranked = np.argsort(-weights, axis=1, kind="stable")
    second = ranked[:, min(1, weights.shape[1] - 1)]
    return np.lexsort((-weights.max(axis=1), second, ranked[:, 0])).astype(np.int64)


def similarity(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the similarity 1 − ½ ‖p_i − p_j‖₁ of each pair of rows.

    Args:
        rows: Distributions ``(m, k)``. Each row sums to 1, or is 0 for a client without labels.

    Returns:
        Similarities ``(m, m)``: 1 for equal rows, 0 for distributions with disjoint support.
    """
    return np.stack([1 - np.abs(rows - row).sum(axis=1) / 2 for row in rows])


def _weights(run: RunDirectory, order: NDArray[np.int64], groups: list[str]) -> Figure:
    weights = run.weights
    names = [str(weights.index[row]) for row in order]
    caption = "One row per client; clients with similar weights are adjacent"
    caption += " within their known group. Training did not use the groups." if groups else "."
    if len(names) > MAX_ROWS:
        caption += f" With {len(names)} clients, adjacent rows are averaged."
    return Figure(
        "weights",
        "Merging weights π of each client",
        Heat(
            weights.to_numpy()[order],
            rows=names,
            columns=[str(column) for column in weights.columns],
            x="adapter (number)",
            label="merging weight π",
            groups=groups,
        ),
        caption,
    )


def _by_round(run: RunDirectory, order: NDArray[np.int64]) -> Iterator[Figure]:
    adapters = run.weights.shape[1]
    by_round = [
        (number, weights)
        for number, weights in run.weights_by_round()
        if weights.shape[1] == adapters  # omit rounds before the grouping
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
            "Rows are clients, in the order of the figure of their final weights. Columns are "
            "adapters.",
        )


def _labels(run: RunDirectory, order: NDArray[np.int64], groups: list[str]) -> Iterator[Figure]:
    counts = run.label_counts
    if counts is None:
        return
    shares = _shares(counts.to_numpy()[order])
    yield Figure(
        "labels",
        "Label distribution of each client",
        Heat(
            shares,
            rows=[str(counts.index[row]) for row in order],
            columns=[str(column) for column in counts.columns],
            x="label",
            label="share of the labels of the client's training examples",
            top=float(min(1.0, math.ceil(10 * shares.max(initial=0.1)) / 10)),
            groups=groups,
        ),
        "Clients are in the order of the figure of the merging weights. If the weights follow the "
        "labels, that figure and this one show the same blocks. Clients may also use the same "
        "label for different things, which this figure does not show.",
    )


def _similarities(
    run: RunDirectory, order: NDArray[np.int64], groups: list[str]
) -> Iterator[Figure]:
    if len(order) > _MAX_PAIRED:
        return
    names = [run.client_names[row] for row in order]
    yield Figure(
        "similarity",
        "Similarity of clients by merging weights",
        _pairs(run.weights.to_numpy()[order], names, groups),
        "Each cell is a pair of clients: 1 for equal weights, 0 for clients without a common "
        "adapter. Blocks are clients that learn together."
        + (f" With {len(names)} clients, cells are averaged." if len(names) > _MAX_CELLS else ""),
    )
    if (counts := run.label_counts) is not None:
        yield Figure(
            "similarity-labels",
            "Similarity of clients by labels",
            _pairs(_shares(counts.to_numpy()[order]), names, groups),
            "The same pairs, compared by the shares of their labels. Blocks that appear only in "
            "the figure of the weights are clients that share adapters although their labels "
            "differ.",
        )


def _pairs(rows: NDArray[Any], names: list[str], groups: list[str]) -> Heat:
    """Return a heat map of the pairwise similarities of ``rows``, averaged to at most 60 × 60."""
    coarse, kept = binned(similarity(rows), names, _MAX_CELLS)
    coarse = binned(coarse.T, names, _MAX_CELLS)[0].T
    return Heat(
        coarse,
        rows=kept,
        columns=(),
        x="clients, in the order of the rows",
        label="similarity 1 − ½ ‖p − q‖₁",
        groups=binned_groups(groups, _MAX_CELLS),
    )


def _shares(counts: NDArray[Any]) -> NDArray[Any]:
    shares: NDArray[Any] = counts / counts.sum(axis=1, keepdims=True).clip(1).astype(float)
    return shares


def adapter_figures(run: RunDirectory) -> Iterator[Figure]:
    """Yield figures of each adapter's mass and of the entropy of π, by round.

    Rounds with another number of adapters than the last round are omitted. Yield none if the last
    round has a single adapter, or the strategy learns no weights.
    """
    records = [record for record in run.records if record["adapter_mass"]]
    widths = [len(record["adapter_mass"]) for record in records]
    records = [record for record, width in zip(records, widths, strict=True) if width == widths[-1]]
    if not records or widths[-1] < 2:
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
    entropies = [record["weights_entropy"] for record in records]
    yield Figure(
        "entropy",
        "Entropy of the merging weights, by round",
        Lines(
            [Line("entropy", [record["round"] for record in records], entropies)],
            x="round",
            y="entropy of π, in units of log d",
            floor=0,
            ceiling=1,
        ),
        "1: every client weights all adapters equally. 0: every client uses a single adapter. Mean "
        "over clients, in units of log d.",
    )

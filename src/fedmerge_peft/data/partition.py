"""Random partitions of rows among clients, with numpy's generators.

The argument ``classes`` contains one class number per row, from 0. Rows with class -1 are not
assigned. The schemes ``iid``, ``dirichlet``, ``clusters``, ``natural`` and ``shards`` return
disjoint, sorted row numbers of one split for each client. ``assign_by_class`` divides a
split in given proportions. ``split_off`` sets training rows aside for evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import DataError

MAX_DRAWS = 1000
_STREAMS = ("train", "validation", "test", "set aside", "max_test")
Stream = Literal["train", "validation", "test", "set aside", "max_test"]


class ClientRows(NamedTuple):
    """Row numbers of a client in one split."""

    name: str
    rows: Indices
    group: str = ""


def generator(seed: int, stream: Stream, client: int = 0) -> np.random.Generator:
    """Create the random generator for one purpose (``stream``) and client.

    Random numbers that are drawn in training do not change it.
    """
    return np.random.default_rng(
        np.random.SeedSequence([seed, 0xDA7A, _STREAMS.index(stream), client])
    )


def iid(examples: int, clients: int, rng: np.random.Generator) -> list[ClientRows]:
    """Divide rows ``0 … examples - 1`` at random into parts whose sizes differ by at most 1."""
    parts = np.array_split(rng.permutation(examples), clients)
    return _client_rows(client_names(clients), parts)


def dirichlet(
    classes: Indices, clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[ClientRows]:
    """Distribute each class k over the clients with proportions p_k ~ Dirichlet(α · 1).

    The rows of class k are shuffled and cut at ⌊n_k · cumsum(p_k) + u_k⌋ with u_k uniform in
    [0, 1). Without u_k, rounding would favor the last client in every class. Proportions are drawn
    again until each client has ``min_examples`` rows.

    Yurochkin et al. 2019 (arXiv 1905.12022, experiments) distribute classes over clients in this
    way. Hsu et al. 2019 (arXiv 1909.06335, section 3) draw the class mix of each client instead.

    Raises:
        DataError: There are fewer rows than clients × min_examples, or no draw out of 1000 gives
            each client ``min_examples`` rows.
    """
    sizes = np.bincount(classes[classes >= 0])
    if sizes.sum() < clients * min_examples:
        raise DataError(
            f"data.partition: clients {clients} × min_examples {min_examples} is more than the "
            f"number of training examples, {sizes.sum():,}; lower data.partition.clients or "
            "data.partition.min_examples"
        )
    best = 0
    for _ in range(MAX_DRAWS):
        proportions = rng.dirichlet(np.full(clients, alpha), size=len(sizes))  # (classes, clients)
        positions = proportions[:, :-1].cumsum(axis=1) * sizes[:, None] + rng.random(
            (len(sizes), 1)
        )
        cuts = np.minimum(np.floor(positions), sizes[:, None]).astype(np.int64)
        counts = np.diff(cuts, axis=1, prepend=0, append=sizes[:, None])
        smallest = int(counts.sum(axis=0).min())
        if smallest >= min_examples:
            parts = zip(_shuffled_by_class(classes, len(sizes), rng), cuts, strict=True)
            return _client_rows(
                client_names(clients), _merge_parts([np.split(rows, cut) for rows, cut in parts])
            )
        best = max(best, smallest)
    raise DataError(
        f"data.partition: in each of {MAX_DRAWS:,} random draws with alpha {alpha:g}, a client got "
        f"fewer training examples than min_examples, {min_examples} (at best {best}); raise "
        "data.partition.alpha, or lower data.partition.clients or data.partition.min_examples"
    )


def clusters(
    classes: Indices,
    clients: int,
    groups: int,
    classes_per_group: int,
    rng: np.random.Generator,
    *,
    size_spread: float = 0.0,
    deck: bool = False,
) -> list[ClientRows]:
    """Assign a random subset of the classes to each group of clients.

    This is FedMerge's cluster setting (arXiv 2504.06768, experiments). The rows of a class are
    divided evenly among the clients of all groups that have it. A class without a group is unused.
    The groups are named ``cluster-0``, ``cluster-1``, ….

    Args:
        classes: Class number of each row, ``(rows,)``.
        clients: Total number of clients.
        groups: Number of groups.
        classes_per_group: Number of classes of a group, drawn without replacement.
        rng: Generator of all draws.
        size_spread: Relative spread s. The number of clients of a group is drawn from the range
            ``clients / groups`` · (1 ± s). With 0, group sizes differ by at most 1.
        deck: True to deal the classes to one group after another from a shuffled deck, which is
            renewed when it runs out. Groups then share as few classes as possible. False to let
            each group draw from all classes.

    Raises:
        DataError: There are fewer classes than ``classes_per_group``.
    """
    count = int(classes.max()) + 1
    if classes_per_group > count:
        raise DataError(
            f"data.partition.classes_per_group: {classes_per_group} is more than the number of "
            f"classes in the training examples, {count}; "
            f"write data.partition.classes_per_group={count}{' or less' * (count > 1)}"
        )
    if size_spread:
        group_sizes = _random_sizes(clients, groups, size_spread, rng)
    else:
        group_sizes = [len(part) for part in np.array_split(np.arange(clients), groups)]
    hands = _hands_of_deck(count, classes_per_group, rng) if deck else None
    shares = np.zeros((clients, count), dtype=np.int64)
    names: list[str] = []
    labels: list[str] = []
    for group, size in zip(_numbered("cluster", groups, 1), group_sizes, strict=True):
        hand = next(hands) if hands else rng.choice(count, classes_per_group, replace=False)
        shares[len(names) : len(names) + size, hand] = 1
        names += client_names(size, f"{group}-client")
        labels += [group] * size
    return _client_rows(names, assign_by_class(classes, shares, rng), labels)


def _random_sizes(total: int, groups: int, spread: float, rng: np.random.Generator) -> list[int]:
    """Draw positive sizes that add up to ``total``, each in the range mean · (1 ± spread).

    The lower limit of the range is rounded down, the upper limit up.
    Sizes are drawn one after another, uniformly from the values for which the remaining sizes can
    still reach ``total``. Then their order is shuffled.
    """
    mean = total / groups
    least, most = max(1, math.floor(mean * (1 - spread))), math.ceil(mean * (1 + spread))
    sizes: list[int] = []
    for left in range(groups - 1, -1, -1):
        rest = total - sum(sizes)
        low, high = max(least, rest - left * most), min(most, rest - left * least)
        sizes.append(int(rng.integers(low, high + 1)))
    return [int(size) for size in rng.permutation(sizes)]


def _hands_of_deck(count: int, size: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Yield hands of ``size`` distinct numbers below ``count``; renew the deck if it runs out."""
    deck = rng.permutation(count)
    while True:
        hand, deck = deck[:size], deck[size:]
        if len(hand) < size:
            fresh = rng.permutation(count)
            others = fresh[~np.isin(fresh, hand)][: size - len(hand)]
            hand, deck = np.concatenate([hand, others]), fresh[~np.isin(fresh, others)]
        yield hand


def natural(
    classes: Indices,
    names: Sequence[str],
    clients_per_value: int,
    rng: np.random.Generator,
    groups: Sequence[str] | None = None,
) -> list[ClientRows]:
    """Assign each class to one client, or divide it among several (``trec6-0``, ``trec6-1``, …).

    Args:
        classes: Class number of each row.
        names: Unique names of the classes. The names of clients derive from them.
        clients_per_value: Number of clients per class.
        rng: Generator that shuffles the rows of each class.
        groups: Group of each class. Default: the name of the class.
    """
    values = [name or "(empty)" for name in names]
    parts = [
        part
        for rows in _shuffled_by_class(classes, len(values), rng)
        for part in np.array_split(rows, clients_per_value)
    ]
    clients = [
        name
        for value in values
        for name in (_numbered(value, clients_per_value, 1) if clients_per_value > 1 else [value])
    ]
    return _client_rows(
        clients,
        parts,
        np.repeat(values if groups is None else list(groups), clients_per_value).tolist(),
    )


def shards(
    classes: Indices, clients: int, shards_per_client: int, rng: np.random.Generator
) -> list[ClientRows]:
    """Sort rows by class, cut them into equal shards, and assign equally many to each client.

    This is the pathological non-IID partition of McMahan et al. 2017 (arXiv 1602.05629, section 3).

    Raises:
        DataError: There are fewer rows than shards.
    """
    count = clients * shards_per_client
    ordered = np.concatenate(_shuffled_by_class(classes, int(classes.max()) + 1, rng))
    if len(ordered) < count:
        raise DataError(
            f"data.partition: clients {clients} × shards_per_client {shards_per_client} is more "
            f"than the number of training examples, {len(ordered):,}; lower data.partition.clients "
            "or data.partition.shards_per_client"
        )
    pieces = np.array_split(ordered, count)
    assigned = rng.permutation(count).reshape(clients, shards_per_client)
    return _client_rows(
        client_names(clients),
        [np.concatenate([pieces[shard] for shard in own]) for own in assigned],
    )


def assign_by_class(
    classes: Indices, shares: NDArray[np.int64], rng: np.random.Generator
) -> list[Indices]:
    """Assign the rows of each class to clients in proportion to their shares.

    Counts follow the largest remainder method (Hamilton). Of the n_k rows of class k, client i
    first gets ⌊n_k s_ik / Σ_i s_ik⌋. The remaining rows go, one each, to the clients with the
    largest remainders; ties go to the client with the fewest rows so far. The counts are
    deterministic, the choice of rows is random.

    Args:
        classes: Class number of each row, ``(rows,)``.
        shares: Integer shares s, ``(clients, classes)``. Rows of a class without shares are not
            assigned.
        rng: Generator that shuffles the rows of each class.

    Returns:
        Sorted, disjoint row numbers of each client. They cover all rows of classes with shares.
    """
    sizes = np.zeros(len(shares), dtype=np.int64)
    parts = []
    for share, rows in zip(
        shares.T, _shuffled_by_class(classes, shares.shape[1], rng), strict=True
    ):
        if not share.any():
            continue
        counts, remainders = np.divmod(len(rows) * share, share.sum())
        by_remainder = np.lexsort((sizes, -remainders))
        counts[by_remainder[: len(rows) - counts.sum()]] += 1
        sizes += counts
        parts.append(np.split(rows, counts.cumsum()[:-1]))
    return _merge_parts(parts) if parts else [np.empty(0, dtype=np.int64) for _ in shares]


def class_counts(client_rows: Sequence[Indices], classes: Indices, count: int) -> NDArray[np.int64]:
    """Count the rows of each class for each client, ``(clients, count)``."""
    return np.stack([np.bincount(classes[rows], minlength=count) for rows in client_rows])


def split_off(
    rows: Indices, validation: float, test: float, max_train: int | None, rng: np.random.Generator
) -> tuple[Indices, Indices, Indices]:
    """Split a client's rows at random into training, validation and test rows.

    Test rows are drawn from all rows. At most ``max_train`` of the other rows are kept, and
    validation rows are drawn from these. Without ``max_train``, training : validation : test is
    about (1 - validation - test) : validation : test. If a client has three or more rows, at least
    one row is drawn for each nonzero fraction, except that ``max_train=1`` leaves no validation
    row. If it has fewer rows, none is drawn for validation or test.

    Args:
        rows: Row numbers of the client.
        validation: Validation fraction, or 0.
        test: Test fraction, or 0. validation + test < 1.
        max_train: Maximum number of training and validation rows together, or None.
        rng: Generator that shuffles the rows.

    Returns:
        Sorted training, validation and test rows.
    """
    shuffled = rng.permutation(rows)
    enough = len(rows) >= 3
    test_count = (
        min(max(1, round(test * len(rows))), len(rows) - (2 if validation else 1))
        if test and enough
        else 0
    )
    kept = min(len(rows) - test_count, max_train or len(rows))
    validation_count = (
        min(max(1, round(validation / (1 - test) * kept)), kept - 1) if validation and enough else 0
    )
    test_rows, rest = shuffled[:test_count], shuffled[test_count : test_count + kept]
    validation_rows, train_rows = rest[:validation_count], rest[validation_count:]
    return np.sort(train_rows), np.sort(validation_rows), np.sort(test_rows)


def client_names(count: int, stem: str = "client") -> list[str]:
    """Return the names ``client-00``, ``client-01``, …, with at least two digits each."""
    return _numbered(stem, count, 2)


def _numbered(stem: str, count: int, width: int) -> list[str]:
    width = max(width, len(str(count - 1)))
    return [f"{stem}-{number:0{width}}" for number in range(count)]


def _shuffled_by_class(classes: Indices, count: int, rng: np.random.Generator) -> list[Indices]:
    """Return the shuffled row numbers of each class; rows with class -1 are left out."""
    shuffled = rng.permutation(len(classes))
    ordered = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return np.split(ordered, np.searchsorted(classes[ordered], np.arange(count + 1)))[1:-1]


def _merge_parts(parts: Sequence[Sequence[Indices]]) -> list[Indices]:
    """Join each client's parts of all classes: ``parts[class][client]`` are row numbers.

    Returns:
        Sorted row numbers of each client.
    """
    return [np.sort(np.concatenate(own)) for own in zip(*parts, strict=True)]


def _client_rows(
    names: Sequence[str], parts: Sequence[Indices], groups: Sequence[str] | None = None
) -> list[ClientRows]:
    groups = [""] * len(names) if groups is None else groups
    return [
        ClientRows(name, np.sort(rows).astype(np.int64), group)
        for name, rows, group in zip(names, parts, groups, strict=True)
    ]

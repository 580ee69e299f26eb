"""Which client holds which example: row numbers dealt out by chance, from numpy's generators alone.

``classes`` is one class number a row everywhere, from 0; rows with -1 are dealt to nobody. Each scheme returns the clients'
holdings of training rows, sorted row numbers that no two clients share. ``assign_by_class`` and ``split_off`` then find the rows that the
same clients are evaluated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import DataError

MAX_DRAWS = 1000
_STREAMS = ("train", "validation", "test", "set aside", "max_test")
Stream = Literal["train", "validation", "test", "set aside", "max_test"]


class ClientRows(NamedTuple):
    """What one client holds of a split."""

    name: str
    rows: Indices
    group: str = ""


def generator(seed: int, stream: Stream, client: int = 0) -> np.random.Generator:
    """The random numbers of one part of the partition: a function of these three, and of nothing that training draws."""
    return np.random.default_rng(
        np.random.SeedSequence([seed, 0xDA7A, _STREAMS.index(stream), client])
    )


def iid(examples: int, clients: int, rng: np.random.Generator) -> list[ClientRows]:
    """Deal rows ``0 … examples - 1`` at random in parts that differ by one at most."""
    parts = np.array_split(rng.permutation(examples), clients)
    return _client_rows(client_names(clients), parts)


def dirichlet(
    classes: Indices, clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[ClientRows]:
    """Spread every class over the clients by proportions p_k ~ Dirichlet(α · 1), drawn again until each client has enough.

    Class k's rows are shuffled and cut at ⌊n_k · cumsum(p_k) + u_k⌋, u_k uniform in [0, 1): without it, rounding would take from
    the first client and give to the last in every class. Yurochkin et al. 2019 (arXiv 1905.12022, experiments) spread classes
    over clients so; Hsu et al. 2019 (arXiv 1909.06335, section 3), after whom it is named, draw each client's class mix instead.

    Raises:
        DataError: There are fewer rows than clients × min_examples, or none of 1000 draws gave every client that many.
    """
    sizes = np.bincount(classes[classes >= 0])
    if sizes.sum() < clients * min_examples:
        raise DataError(
            f"data.partition: {clients} clients × min_examples {min_examples} need {clients * min_examples:,} training examples, and "
            f"there are {sizes.sum():,}; lower data.partition.clients or data.partition.min_examples"
        )
    best = 0
    for _ in range(MAX_DRAWS):
        proportions = rng.dirichlet(np.full(clients, alpha), size=len(sizes))  # (classes, clients)
        places = proportions[:, :-1].cumsum(axis=1) * sizes[:, None] + rng.random((len(sizes), 1))
        cuts = np.minimum(np.floor(places), sizes[:, None]).astype(np.int64)
        counts = np.diff(cuts, axis=1, prepend=0, append=sizes[:, None])
        smallest = int(counts.sum(axis=0).min())
        if smallest >= min_examples:
            parts = zip(_shuffled_by_class(classes, len(sizes), rng), cuts, strict=True)
            return _client_rows(
                client_names(clients), _merge_parts([np.split(rows, cut) for rows, cut in parts])
            )
        best = max(best, smallest)
    raise DataError(
        f"data.partition: in {MAX_DRAWS:,} draws of Dirichlet({alpha:g}) over {clients} clients and {len(sizes)} classes, the smallest "
        f"client never had {min_examples} training examples (at best {best}); raise data.partition.alpha, or lower "
        "data.partition.clients or data.partition.min_examples"
    )


def clusters(
    classes: Indices, clients: int, groups: int, classes_per_group: int, rng: np.random.Generator
) -> list[ClientRows]:
    """Give each group of clients a random subset of the classes; all clients that see a class share its rows evenly.

    FedMerge's cluster setting (arXiv 2504.06768, experiments). Classes are drawn without replacement within a group, and each
    group draws from all of them; a class that no group drew is unused. Group g is called ``cluster-g``.

    Raises:
        DataError: There are fewer classes than classes_per_group.
    """
    count = int(classes.max()) + 1
    if classes_per_group > count:
        raise DataError(
            f"data.partition.classes_per_group: {classes_per_group} classes a group, and the training examples have {count}; "
            f"write data.partition.classes_per_group={count} or less"
        )
    group_sizes = [len(part) for part in np.array_split(np.arange(clients), groups)]
    shares = np.zeros((clients, count), dtype=np.int64)
    names: list[str] = []
    labels: list[str] = []
    for group, size in zip(_numbered("cluster", groups, 1), group_sizes, strict=True):
        shares[
            len(names) : len(names) + size, rng.choice(count, classes_per_group, replace=False)
        ] = 1
        names += client_names(size, f"{group}-client")
        labels += [group] * size
    return _client_rows(names, assign_by_class(classes, shares, rng), labels)


def natural(
    classes: Indices,
    names: Sequence[str],
    clients_per_value: int,
    rng: np.random.Generator,
    groups: Sequence[str] | None = None,
) -> list[ClientRows]:
    """One client for each class, named after it, or a few that share its rows evenly (``trec6-0``, ``trec6-1`` …).

    Args:
        classes: Class number of each row.
        names: Name of each class, all different.
        clients_per_value: How many clients share the rows of one class.
        rng: Where the shares come from.
        groups: Group of each class. Default: its name.
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
    """Sort rows by class, cut them into equal shards, deal each client the same number of shards (McMahan et al. 2017, section 3).

    Raises:
        DataError: There are fewer rows than shards.
    """
    count = clients * shards_per_client
    ordered = np.concatenate(_shuffled_by_class(classes, int(classes.max()) + 1, rng))
    if len(ordered) < count:
        raise DataError(
            f"data.partition: {clients} clients × {shards_per_client} shards need {count:,} training examples, and there are "
            f"{len(ordered):,}; lower data.partition.clients or data.partition.shards_per_client"
        )
    cut = np.array_split(ordered, count)
    dealt = rng.permutation(count).reshape(clients, shards_per_client)
    return _client_rows(
        client_names(clients), [np.concatenate([cut[shard] for shard in mine]) for mine in dealt]
    )


def assign_by_class(
    classes: Indices, shares: NDArray[np.int64], rng: np.random.Generator
) -> list[Indices]:
    """Deal the rows of each class to the clients in proportion to their shares, by largest remainder (Hamilton's method).

    Of class k's n_k rows client i gets ⌊n_k s_ik / Σ_i s_ik⌋; the rows left over go one each to the largest remainders, ties to
    the client with the fewest rows so far. How many a client gets is not random, which ones it gets is.

    Args:
        classes: Class number of each row, ``(rows,)``.
        shares: Whole numbers s, ``(clients, classes)``; a class that has none is dealt to nobody.
        rng: Shuffles the rows of each class.

    Returns:
        Sorted row numbers for each client: an exact cover of the rows whose class has shares.
    """
    held = np.zeros(len(shares), dtype=np.int64)
    parts = []
    for share, rows in zip(
        shares.T, _shuffled_by_class(classes, shares.shape[1], rng), strict=True
    ):
        if not share.any():
            continue
        counts, remainders = np.divmod(len(rows) * share, share.sum())
        by_remainder = np.lexsort((held, -remainders))
        counts[by_remainder[: len(rows) - counts.sum()]] += 1
        held += counts
        parts.append(np.split(rows, counts.cumsum()[:-1]))
    return _merge_parts(parts) if parts else [np.empty(0, dtype=np.int64) for _ in shares]


def class_counts(holdings: Sequence[Indices], classes: Indices, count: int) -> NDArray[np.int64]:
    """How many rows of each class each client holds: ``(clients, count)``."""
    return np.stack([np.bincount(classes[rows], minlength=count) for rows in holdings])


def split_off(
    rows: Indices, validation: float, test: float, max_train: int | None, rng: np.random.Generator
) -> tuple[Indices, Indices, Indices]:
    """Cut one client's rows at random into training, validation and test rows.

    Test rows are taken from all rows; of the others at most ``max_train`` stay, and validation rows come from those, so that
    training : validation : test is (1 - validation - test) : validation : test but for the cap. With three rows or more, each
    fraction above zero gets one row at least; with fewer, all rows stay in training.

    Args:
        rows: The client's rows.
        validation: Fraction for validation, 0 for none.
        test: Fraction for testing, 0 for none; validation + test < 1.
        max_train: Most rows for training and validation together, where there is a cap.
        rng: Shuffles the rows.

    Returns:
        Sorted training, validation and test rows.
    """
    shuffled = rng.permutation(rows)
    enough = len(rows) >= 3
    tested = (
        min(max(1, round(test * len(rows))), len(rows) - (2 if validation else 1))
        if test and enough
        else 0
    )
    kept = min(len(rows) - tested, max_train or len(rows))
    validated = (
        min(max(1, round(validation / (1 - test) * kept)), kept - 1) if validation and enough else 0
    )
    parts = (
        shuffled[tested + validated : tested + kept],
        shuffled[tested : tested + validated],
        shuffled[:tested],
    )
    return np.sort(parts[0]), np.sort(parts[1]), np.sort(parts[2])


def client_names(count: int, stem: str = "client") -> list[str]:
    """``client-00``, ``client-01`` …, as wide as the last number needs."""
    return _numbered(stem, count, 2)


def _numbered(stem: str, count: int, width: int) -> list[str]:
    width = max(width, len(str(count - 1)))
    return [f"{stem}-{number:0{width}}" for number in range(count)]


def _shuffled_by_class(classes: Indices, count: int, rng: np.random.Generator) -> list[Indices]:
    """Each class's rows, shuffled."""
    shuffled = rng.permutation(len(classes))
    ordered = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return np.split(ordered, np.searchsorted(classes[ordered], np.arange(count + 1)))[1:-1]


def _merge_parts(parts: Sequence[Sequence[Indices]]) -> list[Indices]:
    """Parts by class and client to sorted rows by client."""
    return [np.sort(np.concatenate(mine)) for mine in zip(*parts, strict=True)]


def _client_rows(
    names: Sequence[str], parts: Sequence[Indices], groups: Sequence[str] | None = None
) -> list[ClientRows]:
    groups = [""] * len(names) if groups is None else groups
    return [
        ClientRows(name, np.sort(rows).astype(np.int64), group)
        for name, rows, group in zip(names, parts, groups, strict=True)
    ]

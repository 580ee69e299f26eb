"""Confusion matrices of a finished run: test examples by true and predicted class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.data.columns import no_client
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs import documents

if TYPE_CHECKING:
    import pandas as pd

    from fedmerge_peft.runs.directory import RunDirectory

_MOST = 1000
"""Maximum number of labels for which a client's table includes labels that do not occur."""
Cells = Sequence[Sequence[int]]
"""Nonzero cells of a confusion matrix: triples (true class, predicted class, examples)."""


def read_confusion(run: RunDirectory) -> tuple[list[str], Mapping[str, Cells]] | None:
    """Return the labels, and each client's ``Cells`` for the state that a run serves.

    Return None if the run has no confusion matrices of this state: the run has not ended, its task
    has no classes, it is private or across sites, or it serves an earlier round than its last.

    Raises:
        RunError: The file is damaged.
    """
    path = run.path / "confusion.json"
    if not path.is_file():
        return None
    document = documents.read(path)
    if document["after_round"] != run.round():
        return None
    return document["labels"], document["clients"]


def client_confusion(run: RunDirectory, client: str, round: int) -> pd.DataFrame:
    """Return a client's numbers of test examples, true × predicted class.

    With more than 1,000 labels, only labels that occur have a row and a column.

    Args:
        run: The run directory.
        client: Name of the client.
        round: Number of rounds after which the client's adapter was saved.

    Raises:
        RunError: There are no matrices of that round, or the client has no test examples.
    """
    import pandas as pd

    matrices = read_confusion(run)
    if matrices is None or round != run.round():
        raise RunError(
            f"{run.path} has no confusion matrices after round {round}: they are written after "
            "the last round if each example or word has one label, and the run is neither private "
            "nor across sites; use run.predict on labeled examples"
        )
    labels, clients = matrices
    if client not in clients:
        raise RunError(f"{run.path} {no_client(client, list(clients))} with test examples")
    counts = counted([clients[client]])
    shown = range(len(labels)) if len(labels) <= _MOST else used_labels(counts)
    names = [labels[label] for label in shown]
    return pd.DataFrame(matrix(counts, shown), names, names)


def counted(clients: Iterable[Cells]) -> Counter[tuple[int, int]]:
    """Return the number of examples of all clients by true and predicted class."""
    counts: Counter[tuple[int, int]] = Counter()
    for cells in clients:
        for true, predicted, count in cells:
            counts[true, predicted] += count
    return counts


def used_labels(counts: Counter[tuple[int, int]]) -> list[int]:
    """Return the classes that occur as true or predicted class, in ascending order."""
    return sorted({label for pair in counts for label in pair})


def matrix(counts: Counter[tuple[int, int]], labels: Sequence[int]) -> NDArray[np.int64]:
    """Return the counts of these classes, ``(labels, labels)``: true × predicted."""
    place = {label: number for number, label in enumerate(labels)}
    table = np.zeros((len(place), len(place)), dtype=np.int64)
    for (true, predicted), count in counts.items():
        table[place[true], place[predicted]] = count
    return table

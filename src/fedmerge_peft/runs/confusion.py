"""Confusion matrices of a finished run: test examples (or words) by true and predicted class."""

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
"""Nonzero cells of a confusion matrix: triples (true class, predicted class, count).

The count is a number of test examples or, if each word has a label, of words.
"""


def read_confusion(run: RunDirectory) -> tuple[list[str], Mapping[str, Cells]] | None:
    """Return the labels, and the ``Cells`` of each client with scored test examples.

    They count the predictions of the models that the run serves. Return None if the run has no such
    counts: it has not ended, its task has no classes, no client has test examples, it is private or
    across sites, or it serves an earlier round than its last.

    Raises:
        RunError: A file of the run is damaged.
    """
    path = run.path / "confusion.json"
    if not path.is_file():
        return None
    document = documents.read(path)
    if document["after_round"] != run.round():
        return None
    return document["labels"], document["clients"]


def client_confusion(run: RunDirectory, client: str, round: int) -> pd.DataFrame:
    """Return a client's numbers of test examples (or words), true × predicted class.

    With more than 1,000 labels, only labels that occur have a row and a column.

    Args:
        run: The run directory.
        client: Name of the client.
        round: Number of rounds after which the client's adapter was saved.

    Raises:
        RunError: There are no matrices of that round, the run has no such client, or the client has
            no scored test examples.
    """
    import pandas as pd

    matrices = read_confusion(run)
    if matrices is None or round != run.round():
        raise RunError(
            f"{run.path} has no confusion matrices after round {round}: they are written after "
            "the last round if each test example or word has one label, and the run is neither "
            "private nor across sites; use run.predict on labeled examples"
        )
    labels, clients = matrices
    if client not in clients:
        if client not in run.client_names:
            raise RunError(f"{run.path} {no_client(client, run.client_names)}")
        raise RunError(
            f"{run.path}: client {client!r} has no confusion matrix, because it has no test "
            "examples or could not be scored; use run.predict on labeled examples"
        )
    counts = counted([clients[client]])
    shown = range(len(labels)) if len(labels) <= _MOST else used_labels(counts)
    names = [labels[label] for label in shown]
    return pd.DataFrame(matrix(counts, shown), names, names)


def counted(clients: Iterable[Cells]) -> Counter[tuple[int, int]]:
    """Sum the cells of clients; return each count by its pair (true class, predicted class)."""
    counts: Counter[tuple[int, int]] = Counter()
    for cells in clients:
        for true, predicted, count in cells:
            counts[true, predicted] += count
    return counts


def used_labels(counts: Counter[tuple[int, int]]) -> list[int]:
    """Return the classes that occur as true or predicted class, in ascending order."""
    return sorted({label for pair in counts for label in pair})


def matrix(counts: Counter[tuple[int, int]], labels: Sequence[int]) -> NDArray[np.int64]:
    """Return the counts as a matrix ``(labels, labels)``, true × predicted class.

    ``labels`` contains all classes of ``counts``.
    """
    place = {label: number for number, label in enumerate(labels)}
    table = np.zeros((len(place), len(place)), dtype=np.int64)
    for (true, predicted), count in counts.items():
        table[place[true], place[predicted]] = count
    return table

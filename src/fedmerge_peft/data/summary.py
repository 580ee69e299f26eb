"""Summarize a partition as a table and as a chart for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedmerge_peft.data.clients import FederatedData
from fedmerge_peft.data.columns import encode_classes, join_values
from fedmerge_peft.data.partition import class_counts
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    import pandas

SPLITS = ("train", "validation", "test")
_BARS = " ▁▂▃▄▅▆▇█"


def client_table(data: FederatedData, column: str | None) -> pandas.DataFrame:
    """Count the examples of each client by split and by label.

    Args:
        data: Clients and their table.
        column: Column whose values are counted over training rows, or None to count splits only. A
            list counts as its first value.

    Returns:
        Table with one row per client, indexed by name. ``table["examples"]`` has the columns train,
        validation and test. ``table["labels"]`` has one column per value of ``column`` in the
        training rows; it does not exist if ``column`` is None. All entries are numbers of examples.

    Raises:
        DataError: The column cannot be counted (``encode_classes``), such as a column with nulls.
    """
    import pandas

    counts, names = label_counts(data, column)
    columns = [*(("examples", split) for split in SPLITS), *(("labels", name) for name in names)]
    return pandas.DataFrame(
        np.hstack([split_sizes(data), counts]),
        index=pandas.Index([client.name for client in data.clients], name="client"),
        columns=pandas.MultiIndex.from_tuples(columns, names=["count", "of"]),
    )


def terminal_chart(
    data: FederatedData, column: str | None, width: int = 80, height: int = 40
) -> Group:
    """Draw a chart of clients × labels for the terminal.

    Each client has one line with one block per label. The height of a block shows the number of
    training examples.

    Args:
        data: Clients and their table.
        column: Label column, or None to show the sizes of the splits only. A list counts as its
            first value.
        width: Characters per line. Labels beyond the width are counted, not shown.
        height: Maximum number of clients in the chart. Further clients are counted, not shown.

    Returns:
        Renderable for ``rich``.

    Raises:
        DataError: The column cannot be counted (``encode_classes``), such as a column with nulls.
    """
    counts, names = label_counts(data, column)
    shown = data.clients[:height]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("client", no_wrap=True)
    for split in SPLITS:
        table.add_column(split, justify="right", no_wrap=True)
    room = max(
        8,
        width
        - max(len(_short_name(client.name)) for client in shown)
        - sum(len(split) + 1 for split in SPLITS)
        - 2,
    )
    if column is not None:
        table.add_column(Text(printable(column), overflow="ellipsis"), no_wrap=True, max_width=room)
    top = int(counts.max(initial=1))
    for client, row in zip(shown, counts, strict=False):
        sizes = (f"{len(rows):,}" for rows in (client.train, client.validation, client.test))
        table.add_row(
            Text(_short_name(client.name)),
            *sizes,
            *([Text(_bars(row[:room], top))] if column is not None else []),
        )
    lines = (
        [f"… and {len(data.clients) - height:,} more clients"] if len(data.clients) > height else []
    )
    if column is not None:
        lines += (
            [f"… and {len(names) - room:,} more labels to the right"] if len(names) > room else []
        )
        lines += [
            f"block height: number of training examples, {_BARS[-1]} is {top:,}, blank is none",
            f"labels from the left: {join_values(names, 10)}",
        ]
    total = split_sizes(data).sum(axis=0)
    lines += [
        f"{len(data.clients):,} clients, {total[0]:,} training, {total[1]:,} validation "
        f"and {total[2]:,} test examples"
    ]
    return Group(table, *(Text(printable(line), style="dim") for line in lines))


def _short_name(name: str) -> str:
    """Shorten a name to 24 characters; keep its end, which distinguishes the clients of a group."""
    name = printable(name)
    return name if len(name) <= 24 else f"{name[:18]}…{name[-5:]}"


def _bars(counts: NDArray[np.int64], top: int) -> str:
    """Draw one block per count: blank for 0, full for ``top``, rounded up between them."""
    heights = np.where(counts > 0, np.ceil(counts / top * (len(_BARS) - 1)), 0).astype(int)
    return "".join(_BARS[height] for height in heights)


def label_counts(data: FederatedData, column: str | None) -> tuple[NDArray[np.int64], list[str]]:
    """Return the numbers of training rows ``(clients, labels)``, and the names of the labels.

    A list counts as its first value. Without a column, there are no labels.
    """
    if column is None:
        return np.zeros((len(data.clients), 0), dtype=np.int64), []
    # Labels that occur only in evaluation rows would result in empty columns.
    trained = np.concatenate([client.train for client in data.clients])
    splits = {"train": data.table.select(trained)}
    numbers, names = encode_classes(splits, column, "column", lists=True)
    ends = np.cumsum([client.size for client in data.clients])[:-1]
    positions = np.split(np.arange(len(trained)), ends)
    return class_counts(positions, numbers["train"], len(names)), names


def split_sizes(data: FederatedData) -> NDArray[np.int64]:
    """Count examples by client and split, ``(clients, 3)``."""
    return np.array(
        [[len(client.train), len(client.validation), len(client.test)] for client in data.clients],
        dtype=np.int64,
    )

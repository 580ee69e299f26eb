"""The adapter that each group of clients uses most."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fedmerge_peft.runs.directory import RunDirectory

if TYPE_CHECKING:
    import pandas


def sharing(run: RunDirectory) -> pandas.DataFrame:
    """Return each group's main adapter, which shows whether similar clients share one.

    A client's main adapter is the one with its largest merging weight. A group's main adapter is
    the most frequent main adapter of its clients.

    Returns:
        One row per group in ``run.clients``:
        ``clients`` (number), ``adapter`` (number of the group's main adapter), ``share`` (fraction
        of the group's clients with this main adapter) and ``others`` (names of the other groups
        with this main adapter).
    """
    import pandas

    clients = run.clients.assign(adapter=run.weights.to_numpy().argmax(axis=1))
    groups = clients.groupby("group")["adapter"]
    frame = pandas.DataFrame(
        {
            "clients": groups.size(),
            "adapter": groups.agg(lambda adapters: adapters.mode().iloc[0]),
            "share": groups.agg(lambda adapters: (adapters == adapters.mode().iloc[0]).mean()),
        }
    )
    same = frame.groupby("adapter").groups
    frame["others"] = [
        ", ".join(str(other) for other in same[row.adapter] if other != group)
        for group, row in frame.iterrows()
    ]
    return frame


def known_groups(run: RunDirectory) -> list[str]:
    """Return the group of each client; an empty text for a client without one.

    The list is empty if there are fewer than two groups, or if each group has only one client.
    """
    groups = [
        "" if group != group or group is None else str(group) for group in run.clients["group"]
    ]
    counts = Counter(filter(None, groups))
    return groups if len(counts) > 1 and max(counts.values()) > 1 else []

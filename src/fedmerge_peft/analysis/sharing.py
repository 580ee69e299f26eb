"""Which adapter each group of clients has come to use: whether those who are alike share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmerge_peft.runs.directory import RunDirectory

if TYPE_CHECKING:
    import pandas


def sharing(run: RunDirectory) -> pandas.DataFrame:
    """A client's own adapter is the one with its largest merging weight; a group's is the one that most of its clients have.

    Returns:
        By group (``data.partition.group``, or what the clients were dealt by): ``clients``, ``adapter``, ``share`` (the part of the
        group's clients whose own adapter it is) and ``others`` (the other groups with the same adapter).
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

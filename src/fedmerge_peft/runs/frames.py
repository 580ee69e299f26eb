"""Convert documents of a run directory to data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    "round",
    "seconds",
    "train_loss",
    "weights_entropy",
    "gap",
    "bytes_down",
    "bytes_up",
)


def metrics_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per finished round; an empty frame without rounds.

    The columns are the seconds, the mean training loss, the entropy of π, the gap, the bytes, and
    for the served and the finetuned adapters the mean score, the mean of the worst tenth, and the
    validation loss. Values that a round does not have are missing.
    """
    import pandas as pd

    rows = []
    for record in records:
        row = {key: record[key] for key in _COLUMNS}
        for kind in ("served", "finetuned"):
            for value in ("mean", "worst", "validation_loss"):
                row[f"{kind}_{value}"] = record[kind][value] if record[kind] else None
        rows.append(row)
    return pd.DataFrame(rows).set_index("round") if rows else pd.DataFrame()


def clients_frame(
    clients: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, float]] | None
) -> pd.DataFrame:
    """Return one row per client: group, numbers of examples and, if passed, scores by metric."""
    import pandas as pd

    frame = pd.DataFrame(clients).set_index("name")
    if scores:
        frame = frame.join(pd.DataFrame.from_dict(scores, orient="index"))
    return frame


def label_counts_frame(document: Mapping[str, Any], clients: Sequence[str]) -> pd.DataFrame:
    """Return the numbers of training examples, clients × labels."""
    import pandas as pd

    return pd.DataFrame(document["counts"], index=clients, columns=document["labels"])

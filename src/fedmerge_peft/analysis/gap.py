"""The local-global gap: how far what a client trained is from what it gets next (FedMerge, arXiv 2504.06768)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.runs.directory import RunDirectory

if TYPE_CHECKING:
    import pandas


def local_global_gap(run: RunDirectory) -> pandas.DataFrame:
    """The gap after each round, mean over the clients that took part and were measured.

    Loss and score compare a client's model after local training in round t with what it is served with at the start of round
    t + 1 (after the last round: in the end), on its test examples, or on its validation examples where it has no others. For
    methods that serve a private model the distance is that of the shared adapter, and loss and score are the private model's.

    Returns:
        By round: ``distance`` ‖θ_i(trained) − θ_i(sent next)‖₂, of updates rather than adapters for flora and flexlora; ``loss``,
        next minus trained, nats; and the run's metric, such as ``test_accuracy``, trained minus next. nan in rounds without a
        measurement (``evaluation.every``, ``evaluation.finetuned``).
    """
    import pandas

    records = run.records
    final = run.summary["final"]["served"] if (run.path / "summary.json").is_file() else None
    following = [*(record["served"] for record in records[1:]), final]
    rows = []
    for record, after in zip(records, following, strict=False):
        row: dict[str, Any] = {"round": record["round"], "distance": record["gap"]}
        if record["finetuned"] and after:
            metric = record["finetuned"]["metric"]
            trained, sent = record["finetuned"]["clients"], after["clients"]
            loss = metric.partition("_")[0] + "_loss"
            row["loss"] = _mean_difference(sent, trained, loss)
            row[metric] = _mean_difference(trained, sent, metric)
        rows.append(row)
    return pandas.DataFrame(rows).set_index("round") if rows else pandas.DataFrame()


def _mean_difference(of: dict[str, Any], other: dict[str, Any], score: str) -> float:
    both = [name for name in of if name in other and score in of[name] and score in other[name]]
    return (
        float(np.mean([of[name][score] - other[name][score] for name in both]))
        if both
        else float("nan")
    )

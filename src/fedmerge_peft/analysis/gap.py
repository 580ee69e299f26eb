"""The local-global gap between trained and next served models (FedMerge, arXiv 2504.06768)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.runs.directory import RunDirectory

if TYPE_CHECKING:
    import pandas


def local_global_gap(run: RunDirectory) -> pandas.DataFrame:
    """Return the gap after each round, mean over the clients that took part in the round.

    Loss and score compare a client's model after local training in round t with the model served at
    the start of round t + 1, or with the final model after the last round. They are measured on
    test examples, or on validation examples if no client has test examples. For methods that serve
    a private model, the distance belongs to the shared adapter, and loss and score to the private
    model.

    Returns:
        One row per round, with the column ``distance``: ‖θ_i(trained) − θ_i(sent next)‖₂, which
        flora, fedex_lora and flexlora measure between updates instead of adapters. The columns
        ``loss`` and the run's metric, such as ``test_accuracy``, are added if, for any round, both
        the trained and the next models were scored (``evaluation.every``,
        ``evaluation.finetuned``). The loss is next minus trained, in nats (squared errors for
        regression), and the metric is trained minus next. Loss and metric are means over the
        clients that have the trained and the next score, and nan in rounds without such clients.
        Without a completed round, the frame is empty.
    """
    import pandas

    records = run.records
    last = run.last_scores if (run.path / "summary.json").is_file() else None
    following = [*(record["served"] for record in records[1:]), last]
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


def _mean_difference(first: dict[str, Any], second: dict[str, Any], score: str) -> float:
    """Return the mean of ``first`` − ``second`` over clients that have both; nan without any."""
    differences = [
        first[name][score] - second[name][score]
        for name in first
        if name in second and score in first[name] and score in second[name]
    ]
    return float(np.mean(differences)) if differences else float("nan")

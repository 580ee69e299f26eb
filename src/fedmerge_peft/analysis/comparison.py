"""Runs beside each other: what each method reaches, and what that costs.

Scores are of what clients are served with, on their own examples, without any further training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.analysis.methods import methods
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_is_better

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

REFERENCES = ("local", "fedavg")
"""Strategies that gains are measured from."""
TARGET = "fedavg"
"""The strategy whose final score rounds are counted to."""
_SLACK = 1e-9
"""How far from the target, relative to it, a mean may stay for rounding."""

_WITH_STD = ("mean", "worst_tenth", *(f"gain_over_{reference}" for reference in REFERENCES))
_MEANS = ("spread", "finetuning", "gap", "bytes_down", "bytes_up", "seconds")


def compare(
    runs: Iterable[RunDirectory | PathLike[str] | str],
    *,
    metric: str | None = None,
    target: float | None = None,
) -> pandas.DataFrame:
    """What each method reaches, over its runs with different seeds: ``Comparison.of(...).methods``."""
    return Comparison.of(runs, metric=metric, target=target).methods


def find_runs(paths: Iterable[PathLike[str] | str]) -> list[RunDirectory]:
    """The runs in these directories and at any depth below, so baselines too; finished or not, each once.

    Raises ``RunError`` for a path that is not there, or that holds no run.
    """
    found: dict[Path, RunDirectory] = {}
    for path in map(Path, paths):
        below = sorted(file.parent for file in path.rglob("recipe.yaml"))
        if not below:
            what = "holds no run" if path.exists() else "does not exist"
            raise RunError(
                f"{path} {what}; give run directories, or folders of them, as fedmerge run and fedmerge sweep make them"
            )
        for folder in below:
            found.setdefault(folder.resolve(), RunDirectory.open(folder))
    return list(found.values())


@dataclass(frozen=True)
class Comparison:
    """Finished runs, sorted into settings (one task, backbone and data) and methods."""

    runs: pandas.DataFrame
    """One row a run: ``path``, ``setting``, ``method``, ``strategy``, ``seed``, ``metric`` and the columns of ``methods``."""
    curves: pandas.DataFrame
    """One row a run and measurement of all its clients: ``run`` (its row in ``runs``), ``setting``, ``method``, ``seed``, ``rounds``
    completed when it was made, and ``mean`` over the clients. Rounds in which a part of the clients took part measured only these,
    and are not here."""
    methods: pandas.DataFrame
    """One row a setting and method, the best mean of a setting first. Means over runs, and with ``_std`` the sample standard
    deviation (nan for a single run):

    runs                how many, each with a seed of its own
    mean                mean over clients of the final score
    worst_tenth         mean over the worst tenth of the clients, rounded up
    spread              standard deviation over the clients
    gain_over_local     improvement of ``mean`` over local training, paired by seed, positive where better; nan where there is
                        no such run, or more than one method that it could be
    gain_over_fedavg    the same over fedavg
    finetuning          improvement of what all clients are served with by a round's local training, in the last tenth of the
                        rounds; nan where that was not measured
    gap                 the local-global gap, ‖·‖₂, in the last tenth of the rounds
    target              the score that the next column counts to: for each run what fedavg ends with on the same seed, found as for
                        the gains, and for a run of fedavg what it ends with itself; or the score that was given
    rounds_to_target    rounds completed at the first measurement of all clients whose mean reached it, median over the runs that have
                        a target; inf where it was never reached, nan without a target
    bytes_down          bytes that a client was sent in the whole run
    bytes_up            bytes that it sent back
    seconds             wall time of the rounds
    """
    target: float | None
    """The score that was given to count rounds to; None where each run's is what fedavg ends with."""

    @classmethod
    def of(
        cls,
        runs: Iterable[RunDirectory | PathLike[str] | str],
        *,
        metric: str | None = None,
        target: float | None = None,
    ) -> Comparison:
        """Read the runs.

        Args:
            runs: Runs, run directories, or folders that hold some at any depth; a run's baselines are runs too. What is not finished
                is left out, with a warning, as is a second run of the same method with the same seed.
            metric: The score to compare, such as ``test_f1``. Default: the one that the runs report first.
            target: The score that rounds are counted to. Default: for each run, what fedavg ends with on the same seed.

        Raises:
            RunError: No such run, none that is finished, no such metric, or runs of one setting that report different ones.
        """
        import pandas

        finished = _finished(runs)
        rows, points = [], []
        for number, run in enumerate(finished):
            row, curve = _measured(run, metric)
            rows.append(row)
            points += [
                {"run": number, "rounds": rounds, "mean": mean} for rounds, mean in curve.items()
            ]
        frame = methods([run.recipe for run in finished]).join(pandas.DataFrame(rows))
        _check_metrics(frame)
        repeated = frame.duplicated(["setting", "method", "seed"])
        _leave_out("the same method and seed again", frame["path"][repeated])
        frame = frame[~repeated]
        curves = pandas.DataFrame(points).merge(
            frame[["setting", "method", "seed"]], left_on="run", right_index=True
        )
        sign = _sign(frame)
        gains = {
            f"gain_over_{strategy}": sign * (frame["mean"] - _counterpart(frame, strategy))
            for strategy in REFERENCES
        }
        paired = _counterpart(frame, TARGET).where(frame["strategy"] != TARGET, frame["mean"])
        frame = frame.assign(**gains, target=paired if target is None else float(target))
        score, goal, better = (
            curves["mean"],
            curves["run"].map(frame["target"]),
            curves["run"].map(sign),
        )
        reached = curves[
            (score * better >= goal * better) | np.isclose(score, goal, rtol=_SLACK, atol=_SLACK)
        ]
        first = reached.groupby("run")["rounds"].min().astype(float)
        frame["rounds_to_target"] = first.reindex(frame.index, fill_value=math.inf).where(
            frame["target"].notna()
        )
        return cls(frame.drop(columns="rest"), curves, _over_seeds(frame), target)


def _finished(runs: Iterable[RunDirectory | PathLike[str] | str]) -> list[RunDirectory]:
    """The runs that have final scores."""
    found = find_runs(each.path if isinstance(each, RunDirectory) else each for each in runs)
    ended = [run for run in found if (run.path / "summary.json").is_file()]
    scored = [run for run in ended if _final(run)]
    _leave_out("not finished", [run.path for run in found if run not in ended])
    _leave_out("finished without any score", [run.path for run in ended if run not in scored])
    if not scored:
        raise RunError("no finished run to compare; fedmerge run and fedmerge sweep make some")
    return scored


def _final(run: RunDirectory) -> dict[str, Any] | None:
    try:
        return run.summary["final"]["served"]  # type: ignore[no-any-return]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run.path / 'summary.json'} is none that this version wrote ({error!r}); leave the run out"
        ) from error


def _leave_out(why: str, paths: Iterable[Path]) -> None:
    if listed := ", ".join(map(str, paths)):
        log.warning("left out, %s: %s", why, listed)


def _measured(run: RunDirectory, metric: str | None) -> tuple[dict[str, Any], dict[int, float]]:
    """What one run reaches and costs, and its mean score by the number of rounds completed."""
    import pandas

    summary, records, final = run.summary, run.records, run.summary["final"]["served"]
    metric = metric or str(final["metric"])
    known = sorted({name for scores in final["clients"].values() for name in scores})
    if metric not in known:
        raise RunError(f"{run.path} has no score {metric}; it has {', '.join(known)}")

    def mean(served: dict[str, Any]) -> float:
        return float(
            np.mean([scores[metric] for scores in served["clients"].values() if metric in scores])
        )

    clients = len(final["clients"])

    def of_all(served: dict[str, Any] | None) -> bool:
        return served is not None and len(served["clients"]) == clients

    greater = greater_is_better(metric.partition("_")[2])
    scores = pandas.Series(
        [each[metric] for each in final["clients"].values() if metric in each]
    ).sort_values(ascending=greater)
    late = records[-math.ceil(len(records) / 10) :]
    finetuning = [
        mean(each["finetuned"]) - mean(each["served"])
        for each in late
        if of_all(each["finetuned"]) and of_all(each["served"])
    ]
    with np.errstate(invalid="ignore"):  # a perplexity may be inf
        spread = scores.std(ddof=0)
    row = {
        "path": run.path,
        "metric": metric,
        "mean": scores.mean(),
        "worst_tenth": scores.head(math.ceil(len(scores) / 10)).mean(),
        "spread": spread,
        "finetuning": (1 if greater else -1) * pandas.Series(finetuning, dtype=float).mean(),
        "gap": pandas.Series([each.get("gap") for each in late], dtype=float).mean(),
        "bytes_down": summary["bytes_down"] / clients,
        "bytes_up": summary["bytes_up"] / clients,
        "seconds": summary["seconds"],
    }
    curve = {
        record["round"] - 1: mean(record["served"])
        for record in records
        if of_all(record["served"])
    }  # before the round trains
    return row, {**curve, summary["rounds"]: float(scores.mean())}


def _check_metrics(runs: pandas.DataFrame) -> None:
    for setting, same in runs.groupby("setting", sort=False):
        first = same.drop_duplicates("metric")
        if len(first) > 1:
            said = "; ".join(f"{row.path} reports {row.metric}" for row in first.itertuples())
            raise RunError(
                f"the runs of {setting} report different metrics: {said}. Choose one that all of them have with --metric"
            )


def _sign(runs: pandas.DataFrame) -> pandas.Series:
    """1 for runs whose metric is better when greater, else -1."""
    return runs["metric"].map(
        lambda metric: 1 if greater_is_better(metric.partition("_")[2]) else -1
    )


def _counterpart(runs: pandas.DataFrame, strategy: str) -> pandas.Series:
    """For each run, the mean score of the strategy's run with the same seed.

    That of the one method that differs in nothing else, or else that of the setting's only method of this strategy; nan where there
    is none, and for the strategy's own runs.
    """
    found = runs["mean"] * math.nan
    of_strategy = runs[runs["strategy"] == strategy]
    for same in (["setting"], ["setting", "rest"]):
        only = of_strategy[of_strategy.groupby(same)["method"].transform("nunique") == 1]
        matched = runs[[*same, "seed"]].merge(
            only[[*same, "seed", "mean"]], how="left", on=[*same, "seed"]
        )["mean"]
        found = matched.set_axis(runs.index).fillna(found)
    return found.where(runs["strategy"] != strategy)


def _over_seeds(runs: pandas.DataFrame) -> pandas.DataFrame:
    """One row a method from one row a run, the best of each setting first."""
    columns: dict[str, tuple[str, str]] = {"metric": ("metric", "first"), "runs": ("seed", "size")}
    for name in _WITH_STD:
        columns |= {name: (name, "mean"), f"{name}_std": (name, "std")}
    columns |= {name: (name, "mean") for name in _MEANS}
    columns |= {"target": ("target", "mean"), "rounds_to_target": ("rounds_to_target", "median")}
    frame = runs.groupby(["setting", "method"], sort=False).agg(**columns).reset_index()
    best_first = np.lexsort((-_sign(frame) * frame["mean"], frame["setting"].factorize()[0]))
    return frame.iloc[best_first].reset_index(drop=True)

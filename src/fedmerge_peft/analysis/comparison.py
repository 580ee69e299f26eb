"""Compare finished runs: scores and costs of each method.

Scores measure the served models on the clients' own examples, without further training.
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
from fedmerge_peft.analysis.pictures import ComparisonPicture, comparison_html
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.runs.record import worst_tenth
from fedmerge_peft.tasks.metrics import greater_is_better, greater_score_is_better

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

REFERENCES = ("local", "fedavg")
"""Strategies against which the gains of all methods are computed. The list is fixed, because
columns of the tables are named after it."""
TARGET = "fedavg"
"""Strategy whose final score is the default target of ``rounds_to_target``."""
_TOLERANCE = 1e-9
"""Rounding tolerance, relative and absolute, for reaching the target."""

_WITH_STD = ("mean", "worst_tenth", *(f"gain_over_{reference}" for reference in REFERENCES))
_MEANS = ("spread", "finetuning", "gap", "bytes_down", "bytes_up", "seconds")


def compare(
    runs: Iterable[RunDirectory | PathLike[str] | str],
    *,
    metric: str | None = None,
    target: float | None = None,
) -> pandas.DataFrame:
    """Return one row per method, aggregated over its seeds: ``Comparison.of(...).methods``.

    The arguments and errors are those of ``Comparison.of``.
    """
    return Comparison.of(runs, metric=metric, target=target).methods


def find_runs(
    runs: Iterable[RunDirectory | PathLike[str] | str], *, trust_remote_code: bool = False
) -> list[RunDirectory]:
    """Return all runs at or below these paths, including baselines, finished or not.

    Args:
        runs: Runs, run directories, or folders with run directories at any depth.
        trust_remote_code: Consent to import the plugins that the recipes list. A ``RunDirectory``
            keeps its own consent.

    Raises:
        RunError: A path does not exist or holds no run.
    """
    opened: dict[Path, RunDirectory] = {}
    for run in runs:
        path = run.path if isinstance(run, RunDirectory) else Path(run)
        consent = run.trust_remote_code if isinstance(run, RunDirectory) else trust_remote_code
        folders = sorted(file.parent for file in path.rglob("recipe.yaml"))
        if not folders:
            problem = "holds no run" if path.exists() else "does not exist"
            raise RunError(
                f"{path} {problem}; give directories written by fedmerge run or "
                "fedmerge sweep, or folders that contain such directories"
            )
        for folder in folders:
            opened.setdefault(
                folder.resolve(), RunDirectory.open(folder, trust_remote_code=consent)
            )
    return list(opened.values())


@dataclass(frozen=True)
class Comparison:
    """Finished runs, grouped into settings (one task, backbone and data) and methods."""

    runs: pandas.DataFrame
    """One row per run: ``path``, ``setting``, ``method``, ``strategy``, ``seed``, and this run's
    values of the columns of ``methods`` from ``metric`` on, except ``runs`` and those in ``_std``.
    """
    curves: pandas.DataFrame
    """One row per run and evaluation of all its clients: ``run`` (index in ``runs``), ``setting``,
    ``method``, ``seed``, ``rounds`` completed before the evaluation, and ``mean`` over clients.
    Evaluations of fewer clients than have final scores are omitted."""
    methods: pandas.DataFrame
    """One row per ``setting`` and ``method``, the best mean of a setting first. Unless stated
    otherwise, columns are means over the method's runs; columns with ``_std`` are sample standard
    deviations over these runs (nan for a single run).

    metric              name of the score, such as ``test_accuracy``
    runs                number of runs, one per seed
    mean                final score, mean over clients
    worst_tenth         final score, mean over the worst tenth of the clients; the number of these
                        clients is rounded up
    spread              standard deviation of the final score over clients
    gain_over_local     improvement of ``mean`` over local training, paired by seed, positive if
                        better; nan for local training itself, and if no local run matches or
                        local runs of several methods match
    gain_over_fedavg    improvement of ``mean`` over fedavg, likewise
    finetuning          improvement of the served score by one round of local training, mean over
                        those of the last tenth of the rounds in which all clients have the score
                        before and after training; nan if there is no such round
    gap                 the local-global gap, ‖·‖₂, mean over the last tenth of the rounds
    target              the target score for the next column: the argument ``target``, or the final
                        score of fedavg, paired as for the gains; a fedavg run has its own
    rounds_to_target    rounds completed at the first evaluation from which on, up to the served
                        round, the mean over all clients stayed at the target or better; median over
                        the runs that have a target; inf if the served round is worse; nan without a
                        target. Near chance, a single evaluation that reaches it may be luck
    bytes_down          bytes sent to a client in the whole run, mean over clients
    bytes_up            bytes received from a client in the whole run, mean over clients
    seconds             wall time of the rounds
    """
    target: float | None
    """The argument ``target``; None if each run's target is the final score of fedavg."""

    @classmethod
    def of(
        cls,
        runs: Iterable[RunDirectory | PathLike[str] | str],
        *,
        metric: str | None = None,
        target: float | None = None,
    ) -> Comparison:
        """Read and compare runs.

        Args:
            runs: Runs, run directories, or folders with run directories at any depth. The baselines
                of a run are runs too. Unfinished runs, runs without any score, and further runs of
                the same setting, method and seed are skipped with a warning.
            metric: The score to compare, such as ``test_f1``. Default: the runs' main metric.
            target: The target score for counting rounds. Default: for each run, the final score of
                fedavg on the same seed.

        Raises:
            RunError: A path does not exist or holds no run, no finished run has scores, a run lacks
                the metric, or the runs of a setting report different metrics.
        """
        import pandas

        finished = _finished(runs)
        rows, points = [], []
        for number, run in enumerate(finished):
            row, curve = _results(run, metric)
            rows.append(row)
            points += [
                {"run": number, "rounds": rounds, "mean": mean} for rounds, mean in curve.items()
            ]
        frame = methods([run.recipe for run in finished]).join(pandas.DataFrame(rows))
        _check_metrics(frame)
        repeated = frame.duplicated(["setting", "method", "seed"])
        _log_skipped("same method and seed as another run", frame["path"][repeated])
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
        reached = (score * better >= goal * better) | np.isclose(
            score, goal, rtol=_TOLERANCE, atol=_TOLERANCE
        )
        # Going back from the final evaluation, cummin is True until one misses the target.
        served = curves["rounds"] <= curves["run"].map(frame["after_round"])
        backwards = curves.assign(stays=reached)[served].sort_values("rounds", ascending=False)
        stayed = backwards[backwards.groupby("run")["stays"].cummin().astype(bool)]
        first = stayed.groupby("run")["rounds"].min().astype(float)
        frame["rounds_to_target"] = first.reindex(frame.index, fill_value=math.inf).where(
            frame["target"].notna()
        )
        return cls(frame.drop(columns=["rest", "after_round"]), curves, _over_seeds(frame), target)

    def plot(self) -> ComparisonPicture:
        """Return a figure of each setting's scores by round and final scores, for notebooks."""
        return ComparisonPicture(self.methods, self.curves)

    def _repr_html_(self) -> str:
        return comparison_html(self.methods)


def _finished(runs: Iterable[RunDirectory | PathLike[str] | str]) -> list[RunDirectory]:
    """Return the runs that have final scores, and log the others.

    Raises ``RunError`` if no run has them.
    """
    candidates = find_runs(runs)
    ended = [run for run in candidates if (run.path / "summary.json").is_file()]
    scored = [run for run in ended if _final_scores(run)]
    _log_skipped("not finished", [run.path for run in candidates if run not in ended])
    _log_skipped("finished without any score", [run.path for run in ended if run not in scored])
    if not scored and ended:
        raise RunError(
            "no finished run has scores to compare; create one whose clients have test or "
            "validation examples, with fedmerge run or fedmerge sweep"
        )
    if not scored:
        raise RunError(
            "no finished run to compare; finish one with fedmerge resume, or create one with "
            "fedmerge run or fedmerge sweep"
        )
    return scored


def _final_scores(run: RunDirectory) -> dict[str, Any] | None:
    try:
        return run.summary["final"]["served"]  # type: ignore[no-any-return]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run.path / 'summary.json'} cannot be read ({error!r}); exclude the run"
        ) from error


def _log_skipped(reason: str, paths: Iterable[Path]) -> None:
    if names := join_values(paths):
        log.warning("left out of the comparison (%s): %s", reason, names)


def _results(run: RunDirectory, metric: str | None) -> tuple[dict[str, Any], dict[int, float]]:
    """Return one run's scores and costs, and its mean score by the number of completed rounds."""
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

    name = metric.partition("_")[2]
    scores = pandas.Series(
        [client[metric] for client in final["clients"].values() if metric in client]
    )
    last_tenth = records[-math.ceil(len(records) / 10) :]
    finetuning = [
        mean(record["finetuned"]) - mean(record["served"])
        for record in last_tenth
        if of_all(record["finetuned"]) and of_all(record["served"])
    ]
    with np.errstate(invalid="ignore"):  # a perplexity may be inf
        spread = scores.std(ddof=0)
    row = {
        "path": run.path,
        "metric": metric,
        "mean": scores.mean(),
        "worst_tenth": worst_tenth(name, scores),
        "spread": spread,
        "finetuning": (1 if greater_is_better(name) else -1)
        * pandas.Series(finetuning, dtype=float).mean(),
        "after_round": summary["final"]["after_round"],
        "gap": pandas.Series([record.get("gap") for record in last_tenth], dtype=float).mean(),
        "bytes_down": summary["bytes_down"] / clients,
        "bytes_up": summary["bytes_up"] / clients,
        "seconds": summary["seconds"],
    }
    curve = {  # a round's served models are evaluated before it trains
        record["round"] - 1: mean(record["served"])
        for record in records
        if of_all(record["served"])
    }
    last = run.last_scores
    if last is not None:
        curve[summary["rounds"]] = mean(last)
    return row, curve


def _check_metrics(runs: pandas.DataFrame) -> None:
    for setting, same in runs.groupby("setting", sort=False):
        first = same.drop_duplicates("metric")
        if len(first) > 1:
            reports = "; ".join(f"{row.path} reports {row.metric}" for row in first.itertuples())
            raise RunError(
                f"the runs of {setting} report different metrics: {reports}. Choose one that all "
                "runs have: fedmerge compare --metric, or metric= in Python"
            )


def _sign(runs: pandas.DataFrame) -> pandas.Series:
    """Return 1 for runs whose metric is better when greater, else -1."""
    return runs["metric"].map(lambda metric: 1 if greater_score_is_better(metric) else -1)


def _counterpart(runs: pandas.DataFrame, strategy: str) -> pandas.Series:
    """Return, for each run, the mean score of the run of ``strategy`` with the same seed.

    If ``strategy`` has several methods in the setting, the one that differs from the run's method
    only in its strategy matches. If it has a single method, this method matches. The result is nan
    for runs without a match, and for runs of ``strategy`` itself.
    """
    scores = runs["mean"] * math.nan
    of_strategy = runs[runs["strategy"] == strategy]
    for same in (["setting"], ["setting", "rest"]):
        only = of_strategy[of_strategy.groupby(same)["method"].transform("nunique") == 1]
        matched = runs[[*same, "seed"]].merge(
            only[[*same, "seed", "mean"]], how="left", on=[*same, "seed"]
        )["mean"]
        scores = matched.set_axis(runs.index).fillna(scores)
    return scores.where(runs["strategy"] != strategy)


def _over_seeds(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Aggregate runs to one row per method, the best of each setting first."""
    columns: dict[str, tuple[str, str]] = {"metric": ("metric", "first"), "runs": ("seed", "size")}
    for name in _WITH_STD:
        columns |= {name: (name, "mean"), f"{name}_std": (name, "std")}
    columns |= {name: (name, "mean") for name in _MEANS}
    columns |= {"target": ("target", "mean"), "rounds_to_target": ("rounds_to_target", "median")}
    frame = runs.groupby(["setting", "method"], sort=False).agg(**columns).reset_index()
    best_first = np.lexsort((-_sign(frame) * frame["mean"], frame["setting"].factorize()[0]))
    return frame.iloc[best_first].reset_index(drop=True)

"""The methods of a report: its runs and their baselines, with a name and a style for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedmerge_peft.analysis.comparison import REFERENCES
from fedmerge_peft.analysis.methods import methods as method_names
from fedmerge_peft.plotting.palette import method_styles
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_score_is_better


@dataclass(frozen=True)
class Method:
    """A run, with its name and style in all figures of the report."""

    name: str
    run: RunDirectory
    style: int
    """Index into the palette's colors and dashes."""

    @property
    def scores(self) -> dict[str, Any] | None:
        """The run's scores, as ``final_scores`` returns them."""
        return final_scores(self.run)

    def values(self, metric: str, clients: Sequence[str]) -> list[float]:
        """Return one score per client, such as ``test_accuracy``; nan for clients that lack it."""
        scores = self.scores
        if scores is None:
            return [math.nan] * len(clients)
        return [scores["clients"].get(client, {}).get(metric, math.nan) for client in clients]

    def mean(self, metric: str) -> float:
        """Return the mean over the clients that have this score; nan if no client has it."""
        clients = self.scores["clients"].values() if self.scores else ()
        values = [scores[metric] for scores in clients if metric in scores]
        return fmean(values) if values else math.nan


@dataclass(frozen=True)
class Setting:
    """Methods on the same task, backbone and data, which share charts."""

    name: str
    runs: Sequence[Method]
    """The runs with this setting that were passed to the report."""
    methods: Sequence[Method]
    """These runs and their baselines. The first is compared with the others."""

    @property
    def metric(self) -> str | None:
        """Name of the main score, such as ``test_accuracy``, of the first method with scores.

        None if no method has scores.
        """
        return next((method.scores["metric"] for method in self.methods if method.scores), None)

    @property
    def greater_is_better(self) -> bool:
        """True if larger scores are better."""
        return greater_score_is_better(self.metric or "")

    @property
    def clients(self) -> list[str]:
        """The clients' names, in the order of the first run."""
        return self.methods[0].run.client_names

    @property
    def rivals(self) -> list[Method]:
        """The methods after the first that have scores: local, then fedavg, then the others.

        If some of them have the seed of the first method, methods with other seeds are omitted.
        """
        seed = self.methods[0].run.recipe.seed
        scored = [method for method in self.methods[1:] if method.scores]
        paired = [method for method in scored if method.run.recipe.seed == seed]
        return sorted(
            paired or scored,
            key=lambda method: _order(method.run.recipe.strategy.name),
        )

    @property
    def reference(self) -> Method | None:
        """The first of the rivals; None if there are none."""
        return next(iter(self.rivals), None)


def _order(strategy: str) -> int:
    """Return a key that sorts the strategies in ``REFERENCES`` before all others."""
    return REFERENCES.index(strategy) if strategy in REFERENCES else len(REFERENCES)


def settings(runs: Iterable[RunDirectory]) -> list[Setting]:
    """Group runs by task, backbone and data.

    A baseline is omitted if an earlier run or baseline has the same setting, method and seed.
    """
    given = {run.path.resolve(): run for run in runs}
    by_path = dict(given)
    for run in given.values():
        for baseline in run.baselines.values():
            by_path.setdefault(baseline.path.resolve(), baseline)
    order = [path for run in given.values() for path in _with_baselines(run)]
    order = list(dict.fromkeys(order))
    opened = [by_path[path] for path in order]
    frame = method_names([run.recipe for run in opened])
    own = [row for row, path in enumerate(order) if path in given]
    repeated = frame.duplicated(["setting", "method", "seed"])
    frame = frame[~repeated | np.isin(np.arange(len(order)), own)]
    return [
        _setting(str(name), [opened[row] for row in same.index], [*same["method"]], given)
        for name, same in frame.groupby("setting", sort=False)
    ]


def _with_baselines(run: RunDirectory) -> list[Path]:
    return [directory.path.resolve() for directory in (run, *run.baselines.values())]


def _setting(
    name: str,
    runs: Sequence[RunDirectory],
    names: Sequence[str],
    given: Mapping[Path, RunDirectory],
) -> Setting:
    styles = method_styles(
        {name: run.recipe.strategy.name for name, run in reversed([*zip(names, runs, strict=True)])}
    )
    methods = [
        Method(unique, run, styles[name])
        for unique, name, run in zip(_distinct(names, runs), names, runs, strict=True)
    ]
    own = [method for method in methods if method.run.path.resolve() in given]
    return Setting(name, own, methods)


def _distinct(names: Sequence[str], runs: Sequence[RunDirectory]) -> list[str]:
    """Make names unique: append seeds, then folder names, then paths, to names that runs share."""
    for suffixes in (
        [f", seed {run.recipe.seed}" for run in runs],
        [f" ({run.path.name})" for run in runs],
        [f" ({run.path})" for run in runs],
    ):
        repeated = {name for name in names if names.count(name) > 1}
        names = [
            name + suffix if name in repeated else name
            for name, suffix in zip(names, suffixes, strict=True)
        ]
    return list(names)


def final_scores(run: RunDirectory) -> dict[str, Any] | None:
    """Return the scores of the models that a run serves at the end, with the fields of ``Scores``.

    Before the run ends, return the served scores of the last evaluated round. Return None if there
    are no such scores.
    """
    if (run.path / "summary.json").is_file():
        return run.summary["final"]["served"]  # type: ignore[no-any-return]
    return next((record["served"] for record in reversed(run.records) if record["served"]), None)


def readable(metric: str) -> str:
    """Return a score's name with spaces for underscores, such as ``test accuracy``."""
    return metric.replace("_", " ")

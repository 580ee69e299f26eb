"""Learning curves of the methods: losses, scores and local-global gaps by round."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedmerge_peft.analysis import local_global_gap
from fedmerge_peft.plotting.specs import Line, Lines
from fedmerge_peft.recipe.label_tasks import RegressionRecipe
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.methods import Setting, readable
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import facts_of, is_fraction

_FLAT = 0.02
"""Relative decrease below which the training loss counts as flat."""


@dataclass(frozen=True)
class Losses:
    """Finite losses of a run by round, and the loss of guessing.

    They are in nats; for regression, they are squared errors.
    """

    training: list[tuple[int, float]]
    """Pairs of a round and the mean loss of its local training."""
    validation: list[tuple[int, float]]
    """Pairs of a number of completed rounds, and the mean validation loss of the models that are
    served then."""
    chance: float | None
    """log L, the loss of guessing evenly among L labels; None unless each example has one label."""

    @property
    def flat(self) -> bool:
        """True if the training loss rose, or fell by less than ``_FLAT`` of its first value.

        False if fewer than two rounds have a training loss.
        """
        first, last = (self.training[end][1] for end in (0, -1)) if self.training else (0.0, 0.0)
        return len(self.training) > 1 and first - last < _FLAT * abs(first)

    @property
    def turning(self) -> tuple[int, float] | None:
        """Number of completed rounds at the lowest validation loss, and this loss.

        None if the last loss is lower than all others, or if there are fewer than two losses.
        """
        if len(self.validation) < 2:
            return None
        best = min(self.validation, key=lambda point: point[1])
        return best if best[0] < self.validation[-1][0] else None


def losses(run: RunDirectory) -> Losses:
    """Read the losses of a run; omit losses that are not finite."""
    records = run.records
    training = [
        (record["round"], record["train_loss"])
        for record in records
        if record.get("train_loss") is not None and math.isfinite(record["train_loss"])
    ]
    validation = [
        (rounds, scores["validation_loss"])
        for rounds, scores in served(run)
        if scores.get("validation_loss") is not None and math.isfinite(scores["validation_loss"])
    ]
    one_each = run.recipe.task.label_column is not None
    labels = run.task["labels"] if one_each and (run.path / "task.json").is_file() else ()
    return Losses(training, validation, math.log(len(labels)) if len(labels) > 1 else None)


def served(run: RunDirectory) -> list[tuple[int, dict[str, Any]]]:
    """Return pairs of a number of completed rounds and the scores of the models served then."""
    points = [(record["round"] - 1, record["served"]) for record in run.records if record["served"]]
    if (run.path / "summary.json").is_file() and (scores := run.last_scores):
        points.append((len(run.records), scores))
    return points


def learning_figures(setting: Setting) -> Iterator[Figure]:
    """Yield figures of all methods' losses, scores and local-global gaps by round."""
    yield from _losses(setting)
    yield from _scores(setting)
    gaps = []
    for method in setting.methods:
        gap = local_global_gap(method.run)
        if len(gap) and not gap["distance"].isna().all():
            gap = gap[gap["distance"].notna()]
            x, y = [int(number) for number in gap.index], gap["distance"].astype(float).tolist()
            gaps.append(Line(method.name, x, y, style=method.style))
    if gaps:
        yield Figure(
            "gap",
            "Local-global gap: distance between trained and next served adapters",
            Lines(gaps, x="round", y="distance ‖trained − sent next‖₂", floor=0),
            "‖θ trained − θ sent next‖₂ between adapter parameters (flora, fedex_lora and "
            "flexlora: between weight updates), mean over clients. A smaller gap means that "
            "merging preserves more of a client's training.",
        )


def answer(setting: Setting) -> str:
    """Return sentences on how the first method's losses changed."""
    name, curves = setting.methods[0].name, losses(setting.methods[0].run)
    if not curves.training and not curves.validation:
        return "There are no finite losses: no round is done yet, or private sites send none."
    sentences = []
    if curves.training:
        first, last = curves.training[0][1], curves.training[-1][1]
        change = "rose" if last > first else "hardly fell:" if curves.flat else "fell"
        start = f"The training loss of {name} {change} from {first:.2f} to {last:.2f}"
        if len(curves.training) == 1:
            start = f"The training loss of {name} was {last:.2f} in round {curves.training[0][0]}"
        if curves.chance is not None:
            start += f"; guessing evenly among the labels gives {curves.chance:.2f}"
        sentences.append(f"{start}.")
    if curves.turning is not None:
        rounds, best = curves.turning
        done, last = curves.validation[-1]
        place = f"after round {rounds}" if rounds else "before the first round"
        sentences.append(
            f"The validation loss was lowest {place} ({best:.2f}) and is {last:.2f} after round "
            f"{done}."
        )
    elif len(curves.validation) > 1:
        first, last = curves.validation[0][1], curves.validation[-1][1]
        sentences.append(f"The validation loss fell from {first:.2f} to {last:.2f}.")
    return " ".join(sentences)


def _losses(setting: Setting) -> Iterator[Figure]:
    series = []
    for method in setting.methods:
        curves = losses(method.run)
        if curves.validation:
            x, y = zip(*curves.validation, strict=True)
            series.append(Line(f"{method.name}, validation", x, y, style=method.style))
        if curves.training and (method is setting.methods[0] or not curves.validation):
            x, y = zip(*((number - 1, loss) for number, loss in curves.training), strict=True)
            kind: Literal["main", "second"] = "second" if curves.validation else "main"
            name = f"{method.name}, training"
            series.append(Line(name, x, y, style=method.style, kind=kind))
    if not series:
        return
    chance = losses(setting.methods[0].run).chance
    if chance is not None:
        series.append(_constant("guessing", chance, series))
    elif losses(setting.methods[0].run).validation:
        series.append(_constant("before training", series[0].y[0], series))
    regression = isinstance(setting.methods[0].run.recipe.task, RegressionRecipe)
    unit = "squared error" if regression else "nats"
    yield Figure(
        "loss",
        "Loss by round, mean over clients",
        Lines(series, x="rounds completed", y=f"loss ({unit})", floor=None),
        "Validation: loss of the served adapters on examples that clients do not train on. "
        "Training: mean loss during the next round. If the training loss falls while the "
        "validation loss rises, the adapters overfit.",
    )


def _scores(setting: Setting) -> Iterator[Figure]:
    metric = setting.metric
    if metric is None:
        return
    series = []
    for method in setting.methods:
        points = [(x, scores) for x, scores in served(method.run) if scores["metric"] == metric]
        if not points:
            continue
        x = [completed for completed, _ in points]
        means = [scores["mean"] for _, scores in points]
        first = method is setting.methods[0]
        bands = [
            [percentile(scores, percent) for _, scores in points] if first else None
            for percent in (10, 90)
        ]
        series.append(Line(method.name, x, means, bands[0], bands[1], method.style))
        trained = [
            (record["round"] - 1, record["finetuned"]["mean"])
            for record in method.run.records
            if record["finetuned"] and record["finetuned"]["metric"] == metric
        ]
        if first and trained:
            rounds, values = zip(*trained, strict=True)
            series.append(Line("finetuned", rounds, values, style=method.style, kind="second"))
    if not series:
        return
    guess = _most_frequent(setting.methods[0].run) if _counts_classes(metric) else None
    if guess is not None:
        series.append(_constant("guessing", guess, series))
    name = readable(metric)
    bounded = is_fraction(metric)
    yield Figure(
        "scores",
        f"{name[:1].upper()}{name[1:]}, mean over clients, by round",
        Lines(
            series,
            x="rounds completed",
            y=name + ("" if setting.greater_is_better else " (lower is better)"),
            floor=0 if bounded else None,
            ceiling=1 if bounded else None,
        ),
        f"The band covers the middle 80 % of the clients of {setting.methods[0].name}."
        + (
            f" finetuned: the score of {setting.methods[0].name} after one more round of local "
            "training. If it is close to the score of the served models, clients need no "
            "finetuning."
            if any(line.kind == "second" for line in series)
            else ""
        )
        + (
            " guessing: the share of each client's most frequent training label."
            if guess is not None
            else ""
        ),
    )


def _constant(name: str, value: float, series: list[Line]) -> Line:
    x = [value for line in series for value in line.x]
    return Line(name, [min(x), max(x)], [value, value], kind="reference")


def _counts_classes(score: str) -> bool:
    """Return True if a score is the fraction of examples with the correct class."""
    facts = facts_of(score)
    return bool(facts.get("per_example")) and "classes" in facts["of"]


def _most_frequent(run: RunDirectory) -> float | None:
    """Return the share of a client's most frequent training label, mean over clients.

    None if the run has no label counts, or examples do not have one label each.
    """
    counts = run.label_counts
    if counts is None or not len(counts) or run.recipe.task.label_column is None:
        return None
    numbers = counts.to_numpy()
    known = numbers[numbers.sum(axis=1) > 0]
    return float((known.max(axis=1) / known.sum(axis=1)).mean()) if len(known) else None


def percentile(scores: dict[str, Any], percent: float) -> float:
    """Return a percentile (0 to 100) of the clients' finite scores; nan if there are none."""
    metric = scores["metric"]
    values = [
        client_scores[metric]
        for client_scores in scores["clients"].values()
        if metric in client_scores
    ]
    finite = [value for value in values if math.isfinite(value)]
    return float(np.percentile(finite, percent)) if finite else math.nan

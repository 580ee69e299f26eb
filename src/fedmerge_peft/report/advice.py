"""What in a run deserves attention, each with what to do about it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_is_better

_FEW = 30
"""Below so many test examples, one of them moves a client's score by more than three points."""
_GAIN = 0.05
"""A gain of finetuning that says that what is served is not there yet."""
_NAMED = 5


@dataclass(frozen=True)
class Advice:
    """A finding, and what to do."""

    found: str
    do: str


def advice(run: RunDirectory) -> list[Advice]:
    """All findings, the most serious first."""
    return [each for check in _CHECKS for each in check(run)]


def _unfinished(run: RunDirectory) -> Iterator[Advice]:
    if command := run.resume_command:
        done, rounds = len(run.records), run.recipe.rounds
        missing = (
            f"{done} of {rounds} rounds are done"
            if done < rounds
            else "its own rounds are done, those of its baselines are not"
        )
        yield Advice(f"the run has not ended: {missing}", command)


def _warned(run: RunDirectory) -> Iterator[Advice]:
    for warning in run.records[-1]["warnings"] if run.records else []:
        finding, _, remedy = warning.partition(". ")
        yield Advice(
            finding,
            remedy
            or "fewer adapters (strategy.adapters) would do, or more rounds before W settles (strategy.weights_lr)",
        )


def _worse_than_baselines(run: RunDirectory) -> Iterator[Advice]:
    for name, other in run.baselines.items():
        if not ((ours := final(run)) and (theirs := final(other))):
            continue
        sign = 1 if greater_is_better(ours["metric"].partition("_")[2]) else -1
        if sign * (theirs["mean"] - ours["mean"]) > 0:
            yield Advice(
                f"{name} serves better on average: {theirs['mean']:.3f} against {ours['mean']:.3f}",
                "try more rounds, another strategy.warm_rounds or strategy.weights_lr; or take that method",
            )
        if other.recipe.strategy.name == "local":
            lose = [
                client
                for client in _values(ours)
                if sign * (_values(theirs).get(client, math.nan) - _values(ours)[client]) > 0
            ]
            if lose:
                yield Advice(
                    f"{len(lose)} of {len(_values(ours))} clients are served worse than if they had trained alone: {_listed(lose)}",
                    "give them what serves them better, or finetune: strategy=ditto and fedrep keep a private part",
                )


def _finetuning(run: RunDirectory) -> Iterator[Advice]:
    record = next(
        (each for each in reversed(run.records) if each["served"] and each["finetuned"]), None
    )
    if record is None or not greater_is_better(record["served"]["metric"].partition("_")[2]):
        return
    gain = record["finetuned"]["mean"] - record["served"]["mean"]
    if gain > _GAIN:
        yield Advice(
            f"a round of local training still gains {gain:.3f} in round {record['round']}",
            "more rounds, or more adapters",
        )


def _best_is_earlier(run: RunDirectory) -> Iterator[Advice]:
    if (
        (run.path / "best" / "scores.json").is_file()
        and run.records
        and run.round(best=True) < len(run.records)
    ):
        yield Advice(
            f"the validation loss was lowest after round {run.round(best=True)} of {len(run.records)}",
            f"fedmerge export {shlex.quote(str(run.path))} --all --best, or fewer rounds",
        )


def _few_examples(run: RunDirectory) -> Iterator[Advice]:
    few = run.clients[run.clients["test"] < _FEW]
    if len(few):
        least = int(few["test"].min())
        step = (
            f"one more right answer moves a score by {1 / least:.2f}"
            if least
            else "some have none at all"
        )
        yield Advice(
            f"{len(few)} of {len(run.clients)} clients have fewer than {_FEW} test examples ({least} at least): {step}",
            "read single clients with care, and compare means over several seeds: fedmerge sweep",
        )


_CHECKS: tuple[Callable[[RunDirectory], Iterator[Advice]], ...] = (
    _unfinished,
    _warned,
    _worse_than_baselines,
    _finetuning,
    _best_is_earlier,
    _few_examples,
)


def final(run: RunDirectory) -> dict[str, Any] | None:
    """The scores of what all clients are served with in the end; before that, those of the last round that measured; None for none."""
    if (run.path / "summary.json").is_file():
        return run.summary["final"]["served"]  # type: ignore[no-any-return]
    return next((each["served"] for each in reversed(run.records) if each["served"]), None)


def _values(scores: dict[str, Any]) -> dict[str, float]:
    return {
        client: each[scores["metric"]]
        for client, each in scores["clients"].items()
        if scores["metric"] in each
    }


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (
        f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    )


def percentile(scores: dict[str, Any], percent: float) -> float:
    """Of the clients' scores; nan for none."""
    values = [value for value in _values(scores).values() if math.isfinite(value)]
    return float(np.percentile(values, percent)) if values else math.nan

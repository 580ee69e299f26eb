"""Findings about a run that deserve attention, each with advice."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_is_better

_MIN_TEST_EXAMPLES = 30
"""With fewer, one example changes a client's score by more than three points."""
_MIN_GAIN = 0.05
"""Gain of finetuning above which the served adapters have not converged."""
_MAX_LISTED = 5
"""Clients that a finding names."""
_CHANCE = 0.9
"""Share of the loss of guessing above which a training loss is near chance."""


@dataclass(frozen=True)
class Advice:
    """A finding and the recommended action."""

    finding: str
    action: str


def advice(run: RunDirectory) -> list[Advice]:
    """Return all findings, the most serious first."""
    return [item for check in _CHECKS for item in check(run)]


def _unfinished(run: RunDirectory) -> Iterator[Advice]:
    if command := run.resume_command:
        done, rounds = len(run.records), run.recipe.rounds
        progress = (
            f"{done} of {rounds} rounds are done"
            if done < rounds
            else "its rounds are done, but those of its baselines are not"
        )
        yield Advice(f"the run has not ended: {progress}", command)


def _warnings(run: RunDirectory) -> Iterator[Advice]:
    for warning in run.records[-1]["warnings"] if run.records else []:
        finding, _, remedy = warning.partition(". ")
        if finding.startswith("until "):  # ends by itself, unless the run ends first
            if _trained_after_warm_rounds(run) and run.ended_for is not None:
                yield Advice(finding, "use more rounds, or a larger clients.fraction")
            continue
        yield Advice(
            finding,
            remedy
            or "use fewer adapters (strategy.adapters), or more rounds so that W settles "
            "(strategy.weights_lr)",
        )


def _trained_after_warm_rounds(run: RunDirectory) -> bool:
    """Return whether the recipe has rounds after the warm ones, or no warm rounds."""
    strategy = run.recipe.strategy
    warm = getattr(strategy, "start", "warm") == "warm"
    return not warm or run.recipe.rounds > getattr(strategy, "warm_rounds", 0)


def _only_warm_rounds(run: RunDirectory) -> Iterator[Advice]:
    if not _trained_after_warm_rounds(run):
        name, rounds = run.recipe.strategy.name, run.recipe.rounds
        yield Advice(
            f"all {rounds} rounds are warm rounds, in which {name} equals FedAvg: no adapter was "
            "trained for a group",
            f"use more than {getattr(run.recipe.strategy, 'warm_rounds', 0)} rounds, better twice "
            "as many, or a smaller strategy.warm_rounds",
        )


def _loss_near_chance(run: RunDirectory) -> Iterator[Advice]:
    """Compare the last training loss with log L, the loss of guessing one of L labels evenly."""
    labels = run.task["labels"] if (run.path / "task.json").is_file() else ()
    loss = run.records[-1].get("train_loss") if run.records else None
    if len(labels) < 2 or loss is None or loss < _CHANCE * math.log(len(labels)):
        return
    chosen = run.decisions.get("learning_rate")
    if chosen is None:
        action = (
            "leave training.learning_rate at auto, which tests several rates, or raise it; "
            "use more rounds or training.epochs"
        )
    elif chosen["reason"].startswith("chosen"):
        action = "use more rounds or training.epochs"
    else:
        action = (
            "no learning rate reduced the loss: check that labels belong to their inputs, train "
            "more modules (lora.target_modules), or use another backbone"
        )
    yield Advice(
        f"the training loss of the last round is {loss:.2f}, near that of guessing one of "
        f"{len(labels)} labels ({math.log(len(labels)):.2f})",
        action,
    )


def _fewer_adapters_than_groups(run: RunDirectory) -> Iterator[Advice]:
    adapters = getattr(run.recipe.strategy, "adapters", None)
    clients = Counter(group for group in run.clients["group"] if isinstance(group, str) and group)
    groups = sum(count > 1 for count in clients.values())  # a client on its own is no group
    if run.recipe.strategy.shared_soup and isinstance(adapters, int) and adapters < groups:
        yield Advice(
            f"{groups} known groups of clients share {adapters} adapters",
            f"set strategy.adapters to {groups} or more",
        )


def _worse_than_baselines(run: RunDirectory) -> Iterator[Advice]:
    for name, baseline in run.baselines.items():
        if not ((own := final_scores(run)) and (other := final_scores(baseline))):
            continue
        sign = 1 if greater_is_better(own["metric"].partition("_")[2]) else -1
        if sign * (other["mean"] - own["mean"]) > 0:
            yield Advice(
                f"{name} has the better mean score: {other['mean']:.3f} against {own['mean']:.3f}",
                "try more rounds, or another strategy.warm_rounds or strategy.weights_lr; "
                f"otherwise use {name}",
            )
        if not baseline.recipe.strategy.federated:
            own_values, other_values = _values(own), _values(other)
            worse = [
                client
                for client, value in own_values.items()
                if sign * (other_values.get(client, math.nan) - value) > 0
            ]
            if worse:
                yield Advice(
                    f"{len(worse)} of {len(own_values)} clients score lower than with local "
                    f"training alone: {_listed(worse)}",
                    "serve these clients their local adapters, or finetune: strategy=ditto and "
                    "strategy=fedrep keep a private part",
                )


def _finetuning_gain(run: RunDirectory) -> Iterator[Advice]:
    record = next(
        (record for record in reversed(run.records) if record["served"] and record["finetuned"]),
        None,
    )
    if record is None or not greater_is_better(record["served"]["metric"].partition("_")[2]):
        return
    gain = record["finetuned"]["mean"] - record["served"]["mean"]
    if gain > _MIN_GAIN:
        yield Advice(
            f"one round of local training still gains {gain:.3f} in round {record['round']}",
            "use more rounds or more adapters",
        )


def _best_round_is_earlier(run: RunDirectory) -> Iterator[Advice]:
    rounds = len(run.records)
    if (run.path / "best" / "scores.json").is_file() and rounds > 0:
        best = run.round(best=True)
        if best < run.round():
            yield Advice(
                f"the validation loss was lowest after round {best} of {rounds}",
                f"fedmerge export {shlex.quote(str(run.path))} --all --best, use fewer rounds, or "
                "set evaluation.serve: best",
            )


def _few_test_examples(run: RunDirectory) -> Iterator[Advice]:
    few = run.clients[run.clients["test"] < _MIN_TEST_EXAMPLES]
    if len(few):
        least = int(few["test"].min())
        effect = (
            f"one more correct answer changes a score by up to {1 / least:.2f}"
            if least
            else "some have none"
        )
        yield Advice(
            f"{len(few)} of {len(run.clients)} clients have fewer than {_MIN_TEST_EXAMPLES} test "
            f"examples (minimum {least}): {effect}",
            "do not rely on single clients; compare means over several seeds with fedmerge sweep",
        )


_CHECKS: tuple[Callable[[RunDirectory], Iterator[Advice]], ...] = (
    _unfinished,
    _loss_near_chance,
    _only_warm_rounds,
    _warnings,
    _fewer_adapters_than_groups,
    _worse_than_baselines,
    _finetuning_gain,
    _best_round_is_earlier,
    _few_test_examples,
)


def final_scores(run: RunDirectory) -> dict[str, Any] | None:
    """Return the final scores of all clients.

    Before the run ends, these are the scores of the last evaluated round; None without any.
    """
    if (run.path / "summary.json").is_file():
        return run.summary["final"]["served"]  # type: ignore[no-any-return]
    return next((record["served"] for record in reversed(run.records) if record["served"]), None)


def percentile(scores: dict[str, Any], percent: float) -> float:
    """Return a percentile of the clients' scores; nan if there are none."""
    values = [value for value in _values(scores).values() if math.isfinite(value)]
    return float(np.percentile(values, percent)) if values else math.nan


def _values(scores: dict[str, Any]) -> dict[str, float]:
    metric = scores["metric"]
    return {name: client[metric] for name, client in scores["clients"].items() if metric in client}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more

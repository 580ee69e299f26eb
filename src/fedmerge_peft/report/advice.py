"""Findings about a run that deserve attention, each with its likely cause and advice."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedmerge_peft.analysis.intervals import score_intervals
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.report.learning_figures import losses
from fedmerge_peft.report.methods import final_scores, readable
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_score_is_better
from fedmerge_peft.util.text import count_of

_MIN_TEST_EXAMPLES = 30
"""Number of test examples below which one example changes an accuracy by over three points."""
_MIN_GAIN = 0.05
"""Gain of finetuning above which the served adapters have not converged. For metrics that are
better when lower, it is relative to the score."""
_MAX_LISTED = 5
"""Limit on the clients that a finding names."""
_CHANCE = 0.9
"""Fraction of the loss of a uniform guess at and above which a training loss is a finding."""
_SOLVED = 0.1
"""Training loss of the first round, nats, below which there is little left to learn."""


@dataclass(frozen=True)
class Advice:
    """A finding, its likely cause, and the recommended action, each a sentence without a period."""

    finding: str
    cause: str
    action: str


def advice(run: RunDirectory) -> list[Advice]:
    """Return all findings, the most serious first."""
    return [item for check in _CHECKS for item in check(run)]


def _unfinished(run: RunDirectory) -> Iterator[Advice]:
    if command := run.resume_command:
        done, rounds = len(run.records), run.recipe.rounds
        if run.ended_for == rounds:
            progress = "its own rounds have ended, but not all of its baselines have"
        elif done < rounds:
            progress = f"{done} of {rounds} rounds {'is' if done == 1 else 'are'} done"
            if rounds == 1:
                progress = "its only round is not done"
        else:
            progress = "its rounds are done, but its final evaluation is not"
        yield Advice(
            f"the run has not ended: {progress}",
            "it is still running, or was interrupted",
            f"if it was interrupted, continue it: {command}",
        )


def _warnings(run: RunDirectory) -> Iterator[Advice]:
    for warning in run.records[-1]["warnings"] if run.records else []:
        finding, _, remedy = warning.partition(". ")
        if finding.startswith("until "):  # this condition ends by itself, unless the run ends first
            if not only_warm_rounds(run) and run.ended_for is not None:
                waiting = "clients still needed" in finding
                yield Advice(
                    finding,
                    "the run ended before enough clients had taken part"
                    if waiting
                    else "the run ended before it reached that round",
                    "use more rounds, or a larger clients.fraction"
                    if waiting
                    else "use more rounds; if stop.patience ended the run, raise it",
                )
            continue
        if " unused" in finding:
            cause = "there are more adapters than the clients need"
            instead = "try another seed"
            if run.recipe.strategy.learned_merging:
                cause = f"the weights have not settled, or {cause}"
                instead = "let the weights settle: use more rounds or another strategy.weights_lr"
            remedy = remedy or f"use fewer adapters (strategy.adapters), or {instead}"
        else:
            number = len(run.records)
            cause = f"the strategy {run.recipe.strategy.name} found this after round {number}"
        yield Advice(finding, cause, remedy or "change the settings of the strategy")


def only_warm_rounds(run: RunDirectory) -> bool:
    """Return True if the recipe has no rounds after the warm ones."""
    return run.recipe.rounds <= run.recipe.strategy.rounds_with_one_adapter


def _warm_rounds(run: RunDirectory) -> Iterator[Advice]:
    if only_warm_rounds(run):
        name, rounds = run.recipe.strategy.name, run.recipe.rounds
        which = "the only round is a warm round"
        if rounds > 1:
            which = f"all {rounds} rounds are warm rounds"
        warm = run.recipe.strategy.rounds_with_one_adapter
        action = f"use at least {warm + 1} rounds"
        if warm > 1:
            action += f", better {2 * warm} or more"
        if rounds > 1:
            action += ", or a smaller strategy.warm_rounds"
        yield Advice(
            f"{which}, in which {name} equals FedAvg",
            "clients are grouped after the warm rounds, so no adapter was trained for a group",
            action,
        )


def _flat_loss(run: RunDirectory) -> Iterator[Advice]:
    """Yield advice if the training loss hardly fell, rose, or is not well below that of a guess."""
    curves = losses(run)
    loss = curves.training[-1][1] if curves.training else math.nan
    if curves.chance is not None and loss >= _CHANCE * curves.chance:
        place = "near" if loss <= curves.chance / _CHANCE else "above"
        finding = (
            f"the training loss of the last round is {loss:.2f}, {place} the loss of guessing one "
            f"of {len(run.task['labels'])} labels ({curves.chance:.2f})"
        )
    elif curves.flat and curves.training[0][1] > _SOLVED:
        first = curves.training[0][1]
        change = "rose" if loss > first else "hardly fell"
        finding = (
            f"the training loss {change}: {first:.3g} in the first round, {loss:.3g} in the last"
        )
    else:
        return
    chosen = run.decisions.get("learning_rate")
    if chosen is None:
        cause = f"training.learning_rate ({run.recipe.training.learning_rate}) may be too small"
        action = (
            "set training.learning_rate to auto, which tests several rates, or raise it; "
            "use more rounds or training.epochs"
        )
    elif chosen.get("reduced_loss") is None:
        cause = f"the learning rate {chosen['value']:g} was not tested, and may be too small"
        action = "raise training.learning_rate, or use more rounds or training.epochs"
    elif chosen["reduced_loss"]:
        cause = (
            "training was too short; the learning rate is not the cause, because a test chose it"
        )
        action = "use more rounds or training.epochs"
    else:
        cause = "no learning rate reduced the loss, so the adapters cannot fit the examples"
        action = (
            "check that labels belong to their inputs, train more modules (lora.target_modules), "
            "or use another backbone"
        )
    yield Advice(finding, cause, action)


def _fewer_adapters_than_groups(run: RunDirectory) -> Iterator[Advice]:
    adapters = run.recipe.strategy.requested_adapters
    clients = Counter(group for group in run.clients["group"] if isinstance(group, str) and group)
    groups = sum(count > 1 for count in clients.values())  # a client on its own is not a group
    if run.recipe.strategy.shared_soup and isinstance(adapters, int) and adapters < groups:
        number = "1 adapter" if adapters == 1 else f"{adapters} adapters"
        yield Advice(
            f"{groups} known groups of clients share {number}",
            "groups that share an adapter train it in different directions if their tasks differ",
            f"set strategy.adapters to {groups} or more",
        )


def _worse_than_baselines(run: RunDirectory) -> Iterator[Advice]:
    own = final_scores(run)
    for name, baseline in run.baselines.items():
        other = final_scores(baseline)
        if own is None or other is None or own["metric"] != other["metric"]:
            continue
        metric = readable(own["metric"])
        sign = 1 if greater_score_is_better(own["metric"]) else -1
        weakness = "does not learn from other clients"
        if run.recipe.strategy.federated:
            weakness = (
                "loses more by sharing adapters, or by dividing the clients into groups, than it "
                "gains"
            )
        there = [key for key in ("warm_rounds", "weights_lr") if hasattr(run.recipe.strategy, key)]
        examples = f", such as {' and '.join(f'strategy.{key}' for key in there)}" if there else ""
        if sign * (other["mean"] - own["mean"]) > 0:
            yield Advice(
                f"{name} has the better mean {metric}: {other['mean']:.3f} against "
                f"{own['mean']:.3f}",
                f"{run.recipe.strategy.name} {weakness}; or the difference is chance",
                f"try more rounds, or other settings of the strategy{examples}; if this does not "
                f"help, use {name}",
            )
        if not baseline.recipe.strategy.federated:
            yield from _below_local(run, own, other, sign, name)


def _below_local(
    run: RunDirectory, own: dict[str, Any], other: dict[str, Any], sign: int, name: str
) -> Iterator[Advice]:
    own_values, other_values = _values(own), _values(other)
    worse = [
        client
        for client, value in own_values.items()
        if sign * (other_values.get(client, math.nan) - value) > 0
    ]
    if not worse:
        return
    limits = score_intervals(run, own)
    clear = [
        client
        for client in worse
        if limits is not None
        and client in limits
        and not limits[client][0] <= other_values[client] <= limits[client][1]
    ]
    certain = f" (beyond the 95 % interval for {len(clear)} of them)" if limits else ""
    methods = ("ditto", "fedrep") if run.adapter_config.get("modules_to_save") else ("ditto",)
    others = [f"strategy={each}" for each in methods if each != run.recipe.strategy.name]
    action = f"serve these clients their {name} adapters"
    if others:
        action += ", or use another strategy that keeps a part of the model private: "
        action += " or ".join(others)
    yield Advice(
        f"the {readable(own['metric'])} of {len(worse)} of "
        f"{count_of(len(own_values), 'client')} is worse than with {name} training alone{certain}: "
        + join_values(clear or worse, _MAX_LISTED),
        "their data differ from the data of clients that share their adapters, or suffice alone",
        action,
    )


def _finetuning_gain(run: RunDirectory) -> Iterator[Advice]:
    record = next(
        (record for record in reversed(run.records) if record["served"] and record["finetuned"]),
        None,
    )
    if record is None or record["served"]["metric"] != record["finetuned"]["metric"]:
        return
    metric, served = record["served"]["metric"], record["served"]["mean"]
    rises = greater_score_is_better(metric)
    gain = (1 if rises else -1) * (record["finetuned"]["mean"] - served)
    if math.isfinite(gain) and gain > (_MIN_GAIN if rises else _MIN_GAIN * abs(served)):
        change = "raises" if rises else "lowers"
        several = run.recipe.strategy.requested_adapters is not None
        adapters = ", more adapters (strategy.adapters)" if several else ""
        yield Advice(
            f"one round of local training still {change} the {readable(metric)} by {gain:.3g} in "
            f"round {record['round']}",
            "the served adapters have not converged, or are too few to fit every client",
            f"use more rounds{adapters}, or finetune at the clients",
        )


def _overfitting(run: RunDirectory) -> Iterator[Advice]:
    rounds, curves = len(run.records), losses(run)
    saved = (run.path / "best" / "scores.json").is_file()
    best = run.round(best=True) if saved and rounds else rounds
    if best < run.round():
        falls = len(curves.training) > 1 and curves.training[-1][1] < curves.training[0][1]
        when = f"after round {best} of {rounds}" if best else "before the first round"
        others = "or use fewer rounds or epochs"
        if run.recipe.clients.fraction == 1:  # both keys need scores of all clients in each round
            others = (
                "use fewer rounds or epochs, set evaluation.serve: best, or stop early "
                "(stop.patience)"
            )
        yield Advice(
            f"the validation loss was lowest {when}",
            "overfitting: the training loss fell over the run, but the validation loss was not "
            "lower afterwards"
            if falls
            else "later rounds made the adapters worse: the learning rate may be too high",
            "export the adapters of the best round (fedmerge export "
            f"{shlex.quote(str(run.path))} --all --best), {others}",
        )


def _few_test_examples(run: RunDirectory) -> Iterator[Advice]:
    few = run.clients[run.clients["test"] < _MIN_TEST_EXAMPLES]
    scores = final_scores(run)
    if not len(few) or scores is None:
        return
    least = int(few["test"].min())
    share = score_intervals(run, scores) is not None
    have = "has" if len(few) == 1 else "have"
    effect = (
        "clients without test examples have no score"
        if not least
        else f"one more correct answer changes a score by up to {1 / least:.2f}"
        if share
        else "a few unusual examples decide a client's score"
    )
    yield Advice(
        f"{len(few)} of {count_of(len(run.clients), 'client')} {have} fewer than "
        f"{_MIN_TEST_EXAMPLES} test examples (minimum {least})",
        effect,
        "do not rely on single clients; compare means over several seeds with fedmerge sweep",
    )


_CHECKS: tuple[Callable[[RunDirectory], Iterator[Advice]], ...] = (
    _unfinished,
    _flat_loss,
    _warm_rounds,
    _warnings,
    _fewer_adapters_than_groups,
    _worse_than_baselines,
    _finetuning_gain,
    _overfitting,
    _few_test_examples,
)


def _values(scores: dict[str, Any]) -> dict[str, float]:
    metric = scores["metric"]
    return {name: client[metric] for name, client in scores["clients"].items() if metric in client}

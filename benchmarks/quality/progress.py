"""Finished and missing runs of a setting, by its ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from comparison import Method, Setting
from ledger import Effective, Ledger, Line
from search import Choice, Search, search


class Job(NamedTuple):
    """A run that is to be done."""

    setting: Setting
    method: Method
    choice: Choice
    seed: int
    role: str
    """``tuning`` or ``report``."""

    @property
    def values(self) -> Effective:
        """Values that decide the result."""
        return self.setting.effective(self.method, self.choice, self.seed)


@dataclass(frozen=True)
class Progress:
    """A method in a setting."""

    method: Method
    search: Search
    tried: dict[Choice, Line]
    """Finished runs of the search."""
    seeds: dict[int, Line]
    """Finished runs with the chosen candidate, by seed; none before the search has ended."""

    @property
    def chosen(self) -> list[str] | None:
        """Settings of the chosen candidate; None before the search has ended."""
        return None if self.search.waiting else self.method.settings(self.search.best)

    @property
    def at_end(self) -> list[str]:
        """Keys whose chosen value is at the end of its ladder."""
        return [
            axis.key
            for axis, value in zip(self.method.axes, self.search.best, strict=True)
            if axis.at_end(value)
        ]

    @property
    def missing(self) -> list[int]:
        """Seeds that are to be reported and have not run."""
        return [seed for seed in self.method.seeds if seed not in self.seeds]

    @property
    def failed(self) -> dict[int, str]:
        """Reasons of reported runs that could not finish, by seed."""
        return {seed: line["error"] for seed, line in self.seeds.items() if "error" in line}


def progress(setting: Setting, method: Method, ledger: Ledger) -> Progress:
    """Return what the ledger has of a method."""
    tried: dict[Choice, Line] = {}

    def score(choice: Choice) -> float | None:
        """Return the mean validation score; minus infinity if the run could not finish."""
        if choice not in tried:
            line = ledger.find(setting.effective(method, choice, setting.tuning_seed))
            if line is None:
                return None
            tried[choice] = line
        return float("-inf") if "error" in tried[choice] else float(tried[choice]["validation"])

    state = search(method.axes, score)
    runs = (
        {}
        if state.waiting
        else {
            seed: ledger.find(setting.effective(method, state.best, seed)) for seed in method.seeds
        }
    )
    return Progress(
        method, state, tried, {seed: line for seed, line in runs.items() if line is not None}
    )


def jobs(setting: Setting, methods: Iterable[Method], ledger: Ledger) -> Iterator[Job]:
    """Yield the runs that are to be done next: those of the searches, then one seed after another.

    All methods have a seed before any has the next, so that the finished seeds can be compared.
    Runs at one learning rate follow each other, because they share what they train alike, such as
    the rounds of FedAvg.
    """
    found = [progress(setting, method, ledger) for method in methods]
    yield from sorted(
        (
            Job(setting, each.method, choice, setting.tuning_seed, "tuning")
            for each in found
            for choice in each.search.waiting
        ),
        key=_rate,
    )
    done = [each for each in found if not each.search.waiting]
    for seed in sorted({seed for each in done for seed in each.missing}):
        yield from sorted(
            (
                Job(setting, each.method, each.search.best, seed, "report")
                for each in done
                if seed in each.missing
            ),
            key=_rate,
        )


def _rate(job: Job) -> float:
    """Return the value of the first axis, which is the learning rate; 0 without axes."""
    return float(job.choice[0]) if job.choice else 0.0


def plan(setting: Setting, methods: Iterable[Method], ledger: Ledger, each_method: bool) -> str:
    """Return the number of runs that are left, and the time that they take as far as known.

    A method's run takes as long as the median of its finished ones, or else of all in the setting.

    Args:
        each_method: Also return one line per method.
    """
    timed = [line for line in ledger.lines if "seconds" in line]
    lines, total, runs = [], 0.0, 0
    for method in methods:
        each = progress(setting, method, ledger)
        left = each.search.planned + len(each.missing)
        own = [line["seconds"] for line in timed if line["method"] == method.name]
        if known := own or [line["seconds"] for line in timed]:
            total += left * median(known)
        runs += left
        if left and each_method:
            lines.append(
                f"  {method.name:14} {len(each.tried)} candidates tried, at least "
                f"{each.search.planned} left; {len(each.missing)} seeds left"
                f"{f'; {median(known):.0f} s a run' if known else ''}"
            )
    hours = f"about {total / 3600:.1f} hours" if timed else "of unknown length"
    return "\n".join([f"{setting.name}: at least {runs} runs left, {hours}", *lines])

"""The ledger of finished runs: one line of JSON per run, appended and never changed.

Lines have what the pages need, so that run directories can be deleted. Several processes may append
to a ledger, and those of several machines may be joined: of equal runs, the first counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from fedmerge_peft import Recipe, Run
from fedmerge_peft.federation.tuning import describe
from fedmerge_peft.recipe.diff import flat

Line = dict[str, Any]
Effective = dict[str, Any]
"""Values that decide the result of a run, by dotted key."""

_IRRELEVANT = (
    "name",
    "data.path",
    "baselines",
    "tracking",
    "callbacks",
    "plugins",
    "clients.timeout",
    "training.device",
    "training.prefix_cache",
    "training.prefix_disk",
    "training.clients_per_batch",
    "evaluation.batch_size",
    "evaluation.every",
    "evaluation.finetuned",
)
"""Keys on which results do not depend, except for rounding."""

_DEFAULTS: Mapping[str, tuple[Any, Any]] = {
    "strategy.server_momentum": (None, 0.0),
    "strategy.weights_lr": (0.3, None),
    "strategy.weights_columns": ("all", None),
}
"""Values that fedmerge has by default, each with the value that all lines have for it."""


def effective(recipe: Recipe, inputs: Mapping[str, Any]) -> Effective:
    """Return the values of a recipe that decide its result, and those of its inputs.

    Args:
        recipe: Recipe of a run.
        inputs: Digests of the files that it reads. The digest of a backbone replaces its path.
    """
    values = {**flat(recipe), **{f"input.{name}": value for name, value in inputs.items()}}
    left_out = [*_IRRELEVANT, *(["backbone.model"] if "backbone" in inputs else [])]
    values |= {
        key: as_written
        for key, (value, as_written) in _DEFAULTS.items()
        if key in values and values[key] == value
    }
    written = json.dumps({key: value for key, value in values.items() if key not in left_out})
    return dict(json.loads(written))


def digest(values: Effective) -> str:
    """Return 16 hexadecimal digits that identify these values."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """The finished runs of a setting."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._size = 0
        self._found: dict[str, Line] = {}
        self.read()

    def read(self) -> None:
        """Read the complete lines that were added to the file since the last call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._size)
            added, _, _ = file.read().rpartition(b"\n")
        if added:
            self._size += len(added) + 1
            self.lines += [json.loads(line) for line in added.split(b"\n") if line]

    def find(self, values: Effective) -> Line | None:
        """Return the run with these values; None if there is none.

        Only keys that both have are compared, so that a run also counts after a new key, whose
        default changes nothing, was added to the recipes.
        """
        key = digest(values)
        if key not in self._found:
            for line in self.lines:
                recipe = line["recipe"]
                if line["digest"] == key or all(
                    recipe[name] == values[name] for name in recipe.keys() & values.keys()
                ):
                    self._found[key] = line
                    break
        return self._found.get(key)

    def append(self, line: Line) -> None:
        """Add a line. What an interrupted process has left of its own line is removed."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            lock_descriptor(file.fileno(), blocking=True)  # until the file is closed
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.read()


def line_of(run: Run, values: Effective, seconds: float) -> Line:
    """Return the line of a finished run, without what only the comparison knows.

    Args:
        run: The run.
        values: Values that decide its result.
        seconds: Wall time of the process, without loading; less than the run's if it was resumed.
    """
    summary, metric = run.summary, run.recipe.task.metrics[0]
    clients = run.clients.sort_index()
    columns = {part: clients.get(f"{part}_{metric}") for part in ("test", "validation")}
    scores = {part: _rounded([] if of is None else of) for part, of in columns.items()}
    tested = sorted(score for score in scores["test"] if score is not None)
    rounds = summary["rounds"]
    decisions = [sentence for record in run.records for sentence in record.get("decisions", [])]
    return {
        "digest": digest(values),
        "metric": metric,
        "mean": _mean(tested),
        "worst_tenth": _mean(tested[: math.ceil(len(tested) / 10)]),
        "validation": _mean([score for score in scores["validation"] if score is not None]),
        "bytes_down": summary["bytes_down"] / rounds,
        "bytes_up": summary["bytes_up"] / rounds,
        "seconds": round(max(seconds, summary["seconds"]), 1),
        "decisions": [*describe(run.decisions), *decisions],
        "clients": {
            "name": list(clients.index),
            "group": [str(group) if group is not None else None for group in clients["group"]],
            "train": [int(size) for size in clients["train"]],
            **scores,
        },
        **provenance(run.environment),
        "recipe": values,
    }


def failure(error: Exception, values: Effective, environment: Mapping[str, Any]) -> Line:
    """Return the line of a run that cannot finish, for example because training diverged."""
    line = {"digest": digest(values), "error": str(error)}
    return {**line, **provenance(environment), "recipe": values}


def provenance(environment: Mapping[str, Any]) -> Line:
    """Return date, commit, versions and machine of a run."""
    keys = ("commit", "dirty", "processor", "device", "threads")
    return {
        "date": str(environment.get("started", ""))[:10],
        **{key: environment.get(key) for key in keys},
        "versions": environment.get("packages", {}),
    }


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _rounded(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 6) for value in values]

"""Shares of a program's wall time by part, and of a computation's processor time by operation.

A program of a row measures its own parts: it marks blocks with ``Shares.part``, and functions with
``Shares.watch``. Nested time counts for the innermost part only.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any

from timing import Row, seconds

REST = "other"
OPERATIONS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "norms": ("linalg_vector_norm", "norm"),
    "copies": ("copy_", "fill_", "cat"),
    "sums and differences": ("add", "add_", "sub", "sub_", "sum", "mul", "mul_", "mean"),
}
"""Groups of torch's operations, by their names after ``aten::``."""
TRAINING = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "dropout masks": ("native_dropout", "bernoulli_", "native_dropout_backward"),
    "GELU, softmax, LayerNorm": (
        "gelu", "gelu_backward", "_softmax", "_softmax_backward_data",
        "native_layer_norm", "native_layer_norm_backward",
    ),
    "sums, products, copies": (
        "add", "add_", "sub", "sum", "mul", "mul_", "div", "copy_", "fill_", "zero_", "cat",
    ),
    "optimizer": ("_fused_adamw_", "linalg_vector_norm"),
}  # fmt: skip
"""Groups of the operations of training; ``other`` includes torch's own time for each call."""


class Shares:
    """Seconds of wall time by part, since ``begin``."""

    def __init__(self, begin: float, first: str) -> None:
        """Count the time since ``begin``, a time of ``time.monotonic``, for the part ``first``."""
        self.seconds: dict[str, float] = {first: 0.0}
        self._active = [first]
        self._since = begin
        self._change(first)

    def _change(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[self._active[-1]] += now - self._since
        self.seconds.setdefault(part, 0.0)
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block for a part."""
        self._change(name)
        self._active.append(name)
        try:
            yield
        finally:
            self._change(name)
            self._active.pop()

    def watch(self, name: str, owner: Any, *functions: str) -> None:
        """Count the time of functions of a module or class for a part."""
        for function in functions:
            setattr(owner, function, self._watched(name, getattr(owner, function)))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return watched

    def end(self) -> dict[str, float]:
        """Return the seconds of all parts; the time of no part is ``other``."""
        self._change(REST)
        return self.seconds


def watch_engine(shares: Shares) -> None:
    """Count the parts of loading an engine, of its training and of its evaluation."""
    from fedmerge_peft.engines import local, scoring
    from fedmerge_peft.tasks.base import Task
    from fedmerge_peft.training import batching
    from fedmerge_peft.training.prefix_cache import PrefixCache

    shares.watch("model", local, "model_folder", "load_backbone")
    shares.watch("trials", local, "try_inputs", "cut_to_first_token", "labeled_head")
    shares.watch("trials", PrefixCache, "_try_model")
    shares.watch("trials", batching, "_disagreement")
    shares.watch("frozen layers", PrefixCache, "prepare")
    shares.watch("tokens", local, "make_task")
    for task in _with_subclasses(Task):
        if "encode" in vars(task):
            shares.watch("tokens", task, "encode")
    shares.watch("training", local, "train")
    shares.watch("evaluation", scoring, "evaluate_parts")


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def import_libraries(*modules: str) -> None:
    """Import modules that are otherwise imported when they are first used."""
    from importlib import import_module

    for name in modules:
        import_module(name)


def by_operation(
    work: Callable[[], object], operations: Mapping[str, Sequence[str]] = OPERATIONS
) -> dict[str, float]:
    """Return the seconds of processor time of torch's operations in a call, by group."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    found = dict.fromkeys([*operations, REST], 0.0)
    groups = {f"aten::{name}": group for group, names in operations.items() for name in names}
    for event in profiled.key_averages():
        found[groups.get(event.key, REST)] += event.self_cpu_time_total / 1e6
    return found


def row(what: str, runs: Sequence[Mapping[str, float]]) -> Row:
    """Return a row of the median seconds of each part over several runs, and of their shares."""
    parts = list(dict.fromkeys(part for run in runs for part in run))
    medians = {part: median(run.get(part, 0.0) for run in runs) for part in parts}
    total = sum(medians.values())
    listed = ", ".join(
        f"{part} {seconds(value)} ({100 * value / total:.0f} %)" for part, value in medians.items()
    )
    return Row(what, math.nan, math.nan, math.nan, listed)


def report(shares: Shares) -> None:
    """Print the parts of this program for the process that measures."""
    import json

    sys.stdout.write(json.dumps(shares.end()) + "\n")
    sys.stdout.flush()


def run(command: Sequence[str], **options: Any) -> dict[str, float]:
    """Run a program that ends with ``report``; return its parts, with its end as ``other``.

    The time at which the program starts is added to its arguments.
    """
    import json
    import subprocess

    begin = time.monotonic()
    done = subprocess.run(
        [*command, str(begin)], check=True, stdout=subprocess.PIPE, text=True, **options
    )
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    parts[REST] = parts.get(REST, 0.0) + time.monotonic() - begin - sum(parts.values())
    return parts

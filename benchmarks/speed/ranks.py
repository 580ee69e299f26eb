"""Row: rounds of the recipe text_tasks on two ranks against one, on two cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from timing import Row, faster

ROUNDS = 5
"""Rounds of a run; the first one is not counted. Evaluation is part of the last one."""
TASKS = {"trec6": 6, "snips": 7, "ag_news": 4, "subj": 2, "sst2": 2, "amazon_books": 2}
"""Tasks of the recipe and the number of their labels."""
EACH = {"train": 4 * 72, "test": 4 * 50}
"""Texts of a task by split, as many as the recipe uses."""
SIDES = {
    "two ranks": ("2", None),
    "one rank": ("1", None),
    "one rank of one thread": ("1", "1"),
}
"""Values of ``--workers`` and of OMP_NUM_THREADS; without the latter, threads use all cores."""


def rows(overrides: Sequence[str] = (), repeats: int = 3) -> Iterator[Row]:
    """h. A round of the recipe text_tasks on two ranks against one, on two cores.

    Args:
        overrides: Further overrides of the recipe.
        repeats: Runs of each side, in alternating order.
    """
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    with TemporaryDirectory(prefix="speed-") as scratch, two_cores():
        data = table(Path(scratch))
        for repeat in range(repeats):
            for name in list(SIDES)[:: -1 if repeat % 2 else 1]:
                out = Path(scratch, f"{name}-{repeat}".replace(" ", "-"))
                taken[name].append(_round(data, out, *SIDES[name], overrides))
    for name in ("one rank", "one rank of one thread"):
        wanted = "≥ 1.6" if name == "one rank" else ""
        yield faster(f"h. a round on two ranks over {name}", taken, "two ranks", name, wanted)


def table(folder: Path) -> Path:
    """Return the recipe's table, or write one of made texts with the same tasks and sizes."""
    shared = os.environ.get("FEDMERGE_DATA") or Path(__file__).parents[3] / "shared" / "data"
    found = Path(shared, "textcls.parquet")
    return found if found.exists() else made_table(folder / "made.parquet")


def made_table(path: Path) -> Path:
    """Write a table of texts of 20 to 40 words that are drawn at random."""
    from datasets import Dataset
    from setting import _WORDS

    generator = np.random.default_rng(0)
    examples = [
        {
            "task": task,
            "split": split,
            "text": " ".join(generator.choice(_WORDS, generator.integers(20, 41))),
            "label": number % labels,
        }
        for task, labels in TASKS.items()
        for split, count in EACH.items()
        for number in range(count)
    ]
    Dataset.from_list(examples).to_parquet(path)
    return path


def _round(
    data: Path, out: Path, workers: str, threads: str | None, overrides: Sequence[str]
) -> float:
    """Return the median seconds of the rounds of a run after the first."""
    environment = {**os.environ, "FEDMERGE_PREFIX_DISK": "0"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    recipe = [f"data.path={data}", f"rounds={ROUNDS}", "baselines=[]", *overrides]
    options = ["--workers", workers, "--quiet", "--out", str(out)]
    command = [sys.executable, "-m", "fedmerge_peft", "run", *options, "text_tasks", *recipe]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return median(seconds_of_rounds(out)[1:])


def seconds_of_rounds(run: Path) -> list[float]:
    """Return the wall time of each round of a run, in seconds."""
    (metrics,) = run.rglob("metrics.jsonl")
    return [json.loads(line)["seconds"] for line in metrics.read_text("utf-8").splitlines()]


@contextmanager
def two_cores() -> Iterator[None]:
    """Confine this process, and those that it starts, to two cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-2:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

"""Row b: a second run of a recipe against the first, to the end of round 1, in new processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from timing import Row, seconds

CLIENTS, EACH = 4, 12
"""Clients, and training and test examples of each."""


def rows() -> Iterator[Row]:
    """b. Two runs of one recipe, to the end of round 1: a decoder of 30 layers, 27 frozen."""
    import decoder

    with TemporaryDirectory() as folder:
        model = decoder.write(Path(folder))
        pairs = []
        for _ in range(3):
            with TemporaryDirectory() as cache:
                pairs.append((_run(model, cache), _run(model, cache)))
    ratios = [second / first for first, second in pairs]
    first, second = (median(each) for each in zip(*pairs, strict=True))
    yield Row.of(
        "b. second run over first run, from the start of the process to the end of round 1",
        ratios,
        f"second {seconds(second)}, first {seconds(first)} of processor time",
        "≤ 0.4",
    )


def _run(model: str, cache: str) -> float:
    """Return the processor time of a process that keeps states of frozen layers in a folder."""
    environment = {**os.environ, "FEDMERGE_CACHE": cache}
    before = _children()
    subprocess.run([sys.executable, __file__, model], check=True, env=environment)
    return _children() - before


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _round(model: str) -> None:
    import decoder

    from fedmerge_peft import Federation

    engine = decoder.load(model, CLIENTS, EACH, EACH, last=3)
    next(Federation(engine.recipe, engine).rounds())


if __name__ == "__main__":
    _round(sys.argv[1])

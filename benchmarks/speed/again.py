"""Row b: a second run of a recipe against the first, to the end of round 1, in new processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import shares
from timing import Row, seconds

CLIENTS, EACH = 4, 12
"""Clients, and training and test examples of each."""
LIBRARIES = (
    "accelerate",
    "datasets",
    "peft",
    "transformers.models.llama.modeling_llama",
    "fedmerge_peft.engines.local",
    "fedmerge_peft.federation.loop",
)


def rows(sizes: Mapping[str, int] | None = None, repeats: int = 3) -> Iterator[Row]:
    """b. Two runs of one recipe, to the end of round 1: a decoder of 30 layers, 27 frozen.

    Args:
        sizes: Sizes of another decoder.
        repeats: Pairs of a first and a second run, each with a cache of its own.
    """
    import decoder

    with TemporaryDirectory() as folder:
        model = decoder.write(Path(folder), sizes or decoder.SIZES)
        pairs = []
        for _ in range(repeats):
            with TemporaryDirectory() as cache:
                pairs.append((_run(model, cache), _run(model, cache)))
    totals = [tuple(sum(run.values()) for run in pair) for pair in pairs]
    first, second = (median(each) for each in zip(*totals, strict=True))
    yield Row.of(
        "b. second run over first run, from the start of the process to the end of round 1",
        [second / first for first, second in totals],
        f"second {seconds(second)}, first {seconds(first)}",
        "≤ 0.4",
    )
    for name, runs in zip(("first", "second"), zip(*pairs, strict=True), strict=True):
        yield shares.row(f"b. parts of the {name} run", runs)


def _run(model: str, cache: str) -> dict[str, float]:
    """Return the seconds of a process by part; states of frozen layers are kept in a folder."""
    environment = {**os.environ, "FEDMERGE_CACHE": cache}
    environment.pop("FEDMERGE_PREFIX_DISK", None)
    return shares.run([sys.executable, __file__, model], env=environment)


def _round(model: str, begin: str) -> None:
    parts = shares.Shares(float(begin), "imports")
    shares.import_libraries("decoder", *LIBRARIES)
    import decoder

    from fedmerge_peft import Federation

    with parts.part(shares.REST):
        shares.watch_engine(parts)
        engine = decoder.load(model, CLIENTS, EACH, EACH, last=max(1, _layers(model) // 10))
        next(Federation(engine.recipe, engine).rounds())
        shares.report(parts)


def _layers(model: str) -> int:
    import json

    return int(json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"])


if __name__ == "__main__":
    _round(*sys.argv[1:])

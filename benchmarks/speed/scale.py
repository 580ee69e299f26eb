"""Row e: the same examples dealt to more clients, of whom 1 % take part in a round."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from timing import Row, seconds

CLIENTS = (10, 1000, 10_000)
EXAMPLES = 20_000
ROUNDS = 5
STRATEGIES = {"fedmerge": "{name: fedmerge, adapters: 8, start: warm}", "fedavg": "fedavg"}


def rows() -> Iterator[Row]:
    """e. 20 000 examples on a tiny model, five rounds into a run directory; each number of clients in a process of its own."""
    for name, strategy in STRATEGIES.items():
        found = {clients: _measured(strategy, clients, 2) for clients in CLIENTS}
        for clients in CLIENTS[1:]:
            (memory, each), (least, fewest) = found[clients], found[CLIENTS[0]]
            ratios = [a / b for a, b in zip(memory, least, strict=True)]
            asked = max(1, clients // 100)
            sides = (
                f"{median(memory):.0f} MB, 10 clients {median(least):.0f} MB; a round {seconds(median(each))} for {asked} "
                f"client{'s' * (asked > 1)}, 10 clients {seconds(median(fewest))} for 1"
            )
            wanted = "≤ 1.1" if clients == CLIENTS[-1] else ""
            yield Row(f"e. {name}: most memory of {clients} clients over 10", median(ratios), min(ratios), max(ratios), sides, wanted)


def _measured(strategy: str, clients: int, repeats: int) -> tuple[list[float], list[float]]:
    """Most resident memory (MB) of each process, and its seconds a round."""
    command = [sys.executable, __file__, strategy, str(clients)]
    said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(repeats)]
    return [float(each[-2]) for each in said], [float(each[-1]) for each in said]


def _run(strategy: str, clients: int) -> tuple[float, float]:
    from setting import engine

    from fedmerge_peft import federate

    loaded = engine(clients, EXAMPLES // clients, f"strategy={strategy}", "training.steps=1", "training.batch_size=2",
                    "clients.fraction=0.01", f"rounds={ROUNDS}", model="tiny:bert")  # fmt: skip
    times: list[float] = []
    with TemporaryDirectory() as folder:
        federate(loaded.recipe, Path(folder) / "run", engine=loaded, on_round=lambda _: times.append(time.perf_counter()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, median(b - a for a, b in pairwise(times))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy")
    parser.add_argument("clients", type=int)
    options = parser.parse_args()
    print(*_run(options.strategy, options.clients))

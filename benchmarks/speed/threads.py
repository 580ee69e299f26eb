"""Seconds of CPU training by OpenMP settings, on free cores and beside a copy of itself.

python benchmarks/speed/threads.py

Each measurement trains four clients of ``quickstart`` in a fresh process, 64 steps after a warm-up.
The settings alternate within each repeat; the table shows medians.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from statistics import median

SETTINGS: dict[str, dict[str, str]] = {
    "rule of cpu_threads": {"OMP_WAIT_POLICY": "passive"},
    "two threads, passive": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"},
    "two threads, default": {"OMP_NUM_THREADS": "2"},
}


def train() -> None:
    """Train four clients after a round that fills the prefix cache; print seconds as JSON."""
    from fedmerge_peft import Recipe
    from fedmerge_peft.federation.loop import Federation

    federation = Federation(Recipe.load("quickstart", ["baselines=[]", "evaluation.every=5"]))
    federation.collect_replies(1, range(4), None)
    wall, cpu = time.perf_counter(), time.process_time()
    federation.collect_replies(2, range(4), None)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))


def measure(settings: dict[str, str], copies: int) -> tuple[float, float]:
    """Return the wall and processor seconds of the slowest of some copies at the same time."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    command = [sys.executable, __file__, "--train"]
    processes = [
        subprocess.Popen(command, env=environment | settings, stdout=subprocess.PIPE, text=True)
        for _ in range(copies)
    ]
    outputs = [process.communicate()[0] for process in processes]
    wall, cpu = max(json.loads(output.splitlines()[-1]) for output in outputs)
    return wall, cpu


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train()
        return
    results: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(arguments.repeats):
        for copies in (1, 2):
            for name, settings in SETTINGS.items():
                results.setdefault((name, copies), []).append(measure(settings, copies))
    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}\n")
    print("| setting | copies | wall, s | processor, s |\n|---|---|---|---|")
    for (name, copies), seconds in results.items():
        wall, cpu = (median(values) for values in zip(*seconds, strict=True))
        print(f"| {name} | {copies} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()

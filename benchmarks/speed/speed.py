"""Measure speed as ratios: each row does the same work in two ways that alternate in one process.

    python benchmarks/speed/speed.py                # all rows
    python benchmarks/speed/speed.py overhead startup
    python benchmarks/speed/speed.py --write        # update benchmarks/results/speed.md

Rows that are not named keep their text in that file. Row ``flower`` needs flwr[simulation] and is
skipped without it. Row ``frameworks`` leaves out nvflare and pfl if they are not installed.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import again
import clients
import compiled
import decoder
import flower
import frameworks
import ranks
import scale
import server
import soup
import startup
from pages import sections, stamp
from timing import TABLE, Row

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed.md"
ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "overhead": clients.overhead,
    "together": clients.together,
    "prefix": clients.prefix,
    "again": again.rows,
    "head": decoder.rows,
    "step": decoder.step,
    "rounds": clients.whole_rounds,
    "flower": flower.rows,
    "frameworks": frameworks.rows,
    "server": server.rows,
    "scale": scale.rows,
    "many": scale.server,
    "sizes": scale.sizes,
    "soup": soup.rows,
    "startup": startup.rows,
    "first_step": startup.first_step,
    "compile": compiled.rows,
    "ranks": ranks.rows,
}
_HEAD = """# Speed

A ratio is the time of the alternative over the time of this package. In the rows on memory and on
the size of adapters, it is the cost of the larger case over the cost of the smaller one. Both sides
alternate in one process, or in processes that share one core. The ratio is the median over the
repeats, with the smallest and the largest. Rows on parts or operations have no ratio: they list
where the time of one side goes. The model is MiniLM (22 M parameters) with 32 tokens per example
and LoRA of rank 8 on query and value.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument(
        "--write", action="store_true", help=f"update benchmarks/results/{RESULTS.name}"
    )
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown row: {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    logging.getLogger("fedmerge_peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)

    for name in options.rows or ROWS:
        lines = []
        for row in ROWS[name]():
            print(row, flush=True)
            lines.append(str(row))
        if lines and options.write:
            write(name, lines)


def write(name: str, lines: list[str]) -> None:
    """Replace the lines of one row in the page as it is now on disk."""
    about = (ROWS[name].__doc__ or "").split("\n")[0]
    table = TABLE + "\n".join(lines)
    found = sections(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found[name] = f"{about}\n\n{table}\n\n{stamp()}"
    page = _HEAD + "".join(
        f"\n## {each}\n\n{found[each].rstrip()}\n" for each in ROWS if each in found
    )
    RESULTS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""How fast it is, in ratios: each row does the same work in two ways, in turns, in one process.

    python benchmarks/speed/speed.py                # all rows
    python benchmarks/speed/speed.py overhead startup
    python benchmarks/speed/speed.py --write        # into benchmarks/results/speed.md

Rows that are not asked for keep what they were in that file. Row ``flower`` runs where flwr[simulation] is installed.
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

import clients
import flower
import scale
import server
import startup
from pages import sections, stamp
from timing import Row

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed.md"
ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "overhead": clients.overhead,
    "together": clients.together,
    "prefix": clients.prefix,
    "rounds": clients.whole_rounds,
    "flower": flower.rows,
    "server": server.rows,
    "scale": scale.rows,
    "sizes": scale.sizes,
    "startup": startup.rows,
    "first_step": startup.first_step,
}
_HEAD = (
    "# Speed\n\nA ratio says how many times as long the other way takes (for memory, and where adapters grow: how many times as much ours "
    "needs with more). Both ways take turns in one process; the ratio is the median over the repeats, with the smallest and the largest. "
    "MiniLM (22 M parameters), 32 tokens an example, LoRA of rank 8 on query and value.\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS.name}")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
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
    """Put a row's lines into the page, in place of what it said; other programs may write other rows meanwhile."""
    about = (ROWS[name].__doc__ or "").split("\n")[0]
    table = (
        "| what | ratio | over the repeats | medians | wanted |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
    )
    found = sections(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found[name] = f"{about}\n\n{table}\n\n{stamp()}"
    page = _HEAD + "".join(
        f"\n## {each}\n\n{found[each].rstrip()}\n" for each in ROWS if each in found
    )
    RESULTS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

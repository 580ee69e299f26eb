"""Run a recipe and its baselines with several seeds, and print the comparison.

    python benchmarks/quality/over_seeds.py quickstart
    python benchmarks/quality/over_seeds.py text_tasks data.path=DATA/textcls.parquet \\
        strategy.adapters=6,8 --seeds 0,1,2 --write

The program is ``fedmerge sweep``: a key may have several values, and the same command again runs
only what is left. The page states date, commit, versions and machine of the runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from provenance import RESULTS, stamp

from fedmerge_peft import Comparison, expand, sweep
from fedmerge_peft.analysis.reports import markdown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a shipped recipe or a file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--out", help="folder of the run directories; default: sweeps/<recipe>")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/<recipe>_seeds.md"
    )
    arguments = parser.parse_intermixed_args()
    name = Path(arguments.recipe).stem
    recipes = expand(arguments.recipe, [*arguments.overrides, f"seed={arguments.seeds}"])
    runs = sweep(
        recipes,
        arguments.out or Path("sweeps", name),
        on_round=lambda name, record: print(f"{name}  {record}", flush=True),
    )
    page = f"{markdown(Comparison.of(runs.values()))}\n{stamp(runs.values())}\n"
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / f"{name}_seeds.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

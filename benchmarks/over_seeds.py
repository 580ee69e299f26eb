"""Run a recipe and its baselines with several seeds; print the comparison, and where, when and how it was made.

    python benchmarks/over_seeds.py quickstart
    python benchmarks/over_seeds.py text_tasks data.path=../shared/data/textcls.parquet strategy.adapters=6,8 --seeds 0,1,2 --write

It is ``fedmerge sweep``, so values may be several, and the same command again does what is left. With --write the page goes to
benchmarks/results/<recipe>.md.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedmerge_peft import Comparison, __version__, expand, sweep
from fedmerge_peft.analysis.reports import markdown

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", help="folder of the run directories; default: sweeps/<recipe>")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<recipe>.md")
    arguments = parser.parse_intermixed_args()
    name = Path(arguments.recipe).stem
    recipes = expand(arguments.recipe, [*arguments.overrides, f"seed={arguments.seeds}"])
    runs = sweep(recipes, arguments.out or Path("sweeps", name), on_round=lambda name, record: print(f"{name}  {record}", flush=True))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    command = shlex.join(["python", "benchmarks/over_seeds.py", arguments.recipe, *arguments.overrides, "--seeds", arguments.seeds])
    page = (
        f"{markdown(Comparison.of(runs.values()))}\n`{command}`, {datetime.now(UTC):%Y-%m-%d}, commit {commit}, fedmerge-peft "
        f"{__version__}, torch {torch.__version__}, {machine()}.\n"
    )
    print(f"\n{page}")
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

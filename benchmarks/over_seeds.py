"""Run a recipe and its baselines with several seeds; print the table that the README quotes.

    python benchmarks/over_seeds.py quickstart
    python benchmarks/over_seeds.py text_tasks data.path=../shared/data/textcls.parquet --seeds 0,1,2

Scores are of the adapters as the server sends them after the last round, on each client's own test examples, without any
local finetuning. Runs go to a temporary directory; with --write the table is put into benchmarks/results/<recipe>.md.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev

import torch

from fedmerge_peft import Recipe, Run, __version__, federate

ROOT = Path(__file__).resolve().parents[1]


def measured(run: Run) -> dict[str, float]:
    """What one run says: percent for the mean and the worst client, seconds, megabytes that the server sent to a client."""
    summary = run.summary
    final = summary["final"]["served"]
    return {
        "mean": 100 * final["mean"],
        "worst": 100 * final["worst"],
        "seconds": summary["seconds"],
        "sent": summary["bytes_down"] / 1e6 / len(run.clients),
    }


def spread(values: list[float], digits: int = 1) -> str:
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{around}"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def table(recipe: str, overrides: list[str], seeds: list[int]) -> str:
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            run = federate(Recipe.load(recipe, [*overrides, f"seed={seed}"]), Path(folder) / "run")
            for name, each in {run.recipe.strategy.name: run, **run.baselines}.items():
                found.setdefault(name, []).append(measured(each))
                print(f"seed {seed}  {name:10}  mean {found[name][-1]['mean']:.1f}  worst {found[name][-1]['worst']:.1f}", flush=True)
    rows = [
        "| strategy | mean over clients, % | worst client, % | MB sent to a client | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, values in found.items():
        columns = [spread([value[key] for value in values]) for key in ("mean", "worst")]
        rows.append(
            f"| {name} | {' | '.join(columns)} | {fmean(v['sent'] for v in values):.1f} | {fmean(v['seconds'] for v in values):.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<recipe>.md")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    text = table(arguments.recipe, arguments.overrides, seeds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    name = Path(arguments.recipe).stem
    command = " ".join(["python benchmarks/over_seeds.py", arguments.recipe, *arguments.overrides, "--seeds", arguments.seeds])
    page = (
        f"# {name}\n\n{text}\n\n"
        f"Mean ± standard deviation over seeds {arguments.seeds}. Adapters as the server sends them after the last round, on each "
        "client's test examples, without local finetuning.\n\n"
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, commit {commit}, fedmerge-peft {__version__}, torch {torch.__version__}, "
        f"{machine()}.\n"
    )
    print(f"\n{page}")
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

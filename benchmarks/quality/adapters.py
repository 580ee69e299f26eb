"""Measure accuracy against d, the number of adapters, on CIFAR-100, as the paper does.

    python benchmarks/quality/adapters.py --data DATA --write

The settings are those of cifar100_clusters.yaml and cifar100_dirichlet.yaml, with as many groups of
clients as adapters. d is 1, 2, 5, 10, 15, and 50, the number of clients; with d = 1 FedMerge is
FedAvg. Several processes may share the work. The same command again runs only what is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from comparison import HERE, Setting
from provenance import RESULTS, stamp

from fedmerge_peft import Recipe, Run, sweep

SETTINGS = {
    "cifar100_clusters": "five groups of ten clients",
    "cifar100_dirichlet": "Dirichlet(0.1)",
}
ADAPTERS = (1, 2, 5, 10, 15, 50)


def recipes(name: str, data: Path, seeds: list[str]) -> dict[str, Recipe]:
    setting = Setting(name, data)
    start = ["strategy=fedmerge", "strategy.start=warm", "training.learning_rate=0.005"]
    return {
        f"d{d}-seed{seed}": Recipe.load(
            setting.source,
            [
                *setting.base,
                *start,
                f"strategy.adapters={d}",
                f"strategy.groups={d}",
                f"seed={seed}",
            ],
        )
        for seed in seeds
        for d in ADAPTERS
    }


def scores(setting: str, runs: dict[str, Run]) -> pd.DataFrame:
    """Return one row per run: setting, d, and the final test scores."""
    rows = []
    for run in runs.values():
        final = run.summary["final"]["served"]
        rows.append(
            {
                "setting": setting,
                "d": run.recipe.strategy.adapters,
                "mean": final["mean"],
                "worst": final["worst"],
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (setting, what), marker in zip(SETTINGS.items(), "os", strict=True):
        means = 100 * table[table["setting"] == setting].pivot_table(
            index="d", values="mean", aggfunc=["mean", "std"]
        )
        axes.errorbar(
            means.index,
            means["mean"]["mean"],
            means["std"]["mean"],
            marker=marker,
            capsize=3,
            label=what,
        )
    axes.set_xscale("log")
    axes.set_xticks(ADAPTERS, [str(d) for d in ADAPTERS])
    axes.minorticks_off()
    axes.set_xlabel("d, adapters in the soup")
    axes.set_ylabel("test accuracy (%), mean over clients")
    axes.set_title(
        "CIFAR-100, 50 clients: if they form groups, as many adapters as groups\n"
        "are best; if not, more adapters are better",
        fontsize=9,
    )
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--runs", type=Path, default=HERE / "runs" / "adapters", help="folder of the runs"
    )
    parser.add_argument(
        "--write", action="store_true", help="write page and figure to benchmarks/results"
    )
    options = parser.parse_args()

    done = {
        name: sweep(
            recipes(name, options.data, options.seeds.split(",")),
            options.runs / name,
            on_run=lambda name, run, _: print(
                name, f"{run.summary['final']['served']['mean']:.3f}", flush=True
            ),
        )
        for name in SETTINGS
    }
    table = pd.concat([scores(name, runs) for name, runs in done.items()])
    lines = [
        f"| {SETTINGS[setting]} | {d} | {100 * means.mean():.1f} ± {100 * means.std():.1f} "
        f"| {100 * worst.mean():.1f} |"
        for (setting, d), rows in table.groupby(["setting", "d"])
        for means, worst in [(rows["mean"], rows["worst"])]
    ]
    page = (
        "# Accuracy against the number of adapters\n\n"
        "FedMerge on CIFAR-100 with 50 clients, without local finetuning. There are as many groups "
        f"as\nadapters. Values are mean ± std over seeds {options.seeds}.\n\n"
        "![Accuracy against d](adapters.svg)\n\n"
        "| clients | d | accuracy, % | worst 10 % |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n\n"
        f"{stamp([run for runs in done.values() for run in runs.values()])}\n"
    )
    print(f"\n{page}")
    if options.write:
        (RESULTS / "adapters.md").write_text(page, encoding="utf-8")
        draw(table, RESULTS / "adapters.svg")


if __name__ == "__main__":
    main()

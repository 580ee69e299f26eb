"""Measure accuracy against d, the number of adapters, on CIFAR-100, for every core method with a d.

    python benchmarks/quality/adapters.py --data DATA --write

FedMerge has its defaults, but as many groups of clients as adapters. The other methods have the
values that the comparison chose (``quality.py``), so their searches in these settings must have
ended; only d is replaced. With d = 1, all of them are FedAvg. A client of IFCA evaluates d
adapters, and a client of FedEM trains d adapters, so they are run up to d = 15 and d = 5. Several
processes may share the work. The same command again runs only what is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from comparison import HERE, Setting
from ledger import Ledger
from progress import progress
from provenance import RESULTS, stamp

from fedmerge_peft import Recipe, Run, sweep

SETTINGS = {
    "cifar100_clusters": "five groups of ten clients",
    "cifar100_dirichlet": "Dirichlet(0.1)",
}
ADAPTERS = {
    "fedmerge": (2, 5, 10, 15, 50),
    "flhc": (2, 5, 10, 15, 50),
    "ifca": (2, 5, 10, 15),
    "fedem": (2, 3, 5),
}
"""Values of d by method. There are 50 clients."""


def recipes(setting: Setting, ledger: Ledger, seeds: list[int]) -> dict[str, Recipe]:
    """Return the recipe of each method, d and seed, by name.

    Raises:
        SystemExit: The search of a method has not ended.
    """
    found = {
        name: progress(setting, setting.methods[name], ledger) for name in ("fedavg", *ADAPTERS)
    }
    if waiting := [name for name, each in found.items() if each.search.waiting]:
        raise SystemExit(
            f"{setting.name}: {', '.join(waiting)} not tuned yet; run quality.py run {setting.name}"
        )
    named: dict[str, Recipe] = {}
    for seed in seeds:
        best = found["fedavg"].search.best
        named[f"fedavg-d1-seed{seed}"] = setting.recipe(setting.methods["fedavg"], best, seed)
        for name, counts in ADAPTERS.items():
            chosen = setting.recipe(setting.methods[name], found[name].search.best, seed)
            for d in counts:
                groups = [f"strategy.groups={d}"] if name == "fedmerge" else []
                named[f"{name}-d{d}-seed{seed}"] = chosen.replace(
                    [f"strategy.adapters={d}", *groups]
                )
    return named


def scores(setting: str, runs: dict[str, Run]) -> pd.DataFrame:
    """Return one row per run: setting, method, d, and the final test scores."""
    rows = []
    for name, run in runs.items():
        method, d, _ = name.split("-")
        final = run.summary["final"]["served"]
        row = {"setting": setting, "d": int(d[1:]), "mean": final["mean"], "worst": final["worst"]}
        methods = tuple(ADAPTERS) if method == "fedavg" else (method,)  # FedAvg is d = 1 of each
        rows += [{**row, "method": each} for each in methods]
    return pd.DataFrame(rows)


def lines_of(table: pd.DataFrame) -> list[str]:
    """Return the table's lines: setting, method, d, mean ± std over seeds, worst 10 %."""
    order = {name: place for place, name in enumerate(ADAPTERS)}
    groups = sorted(
        table.groupby(["setting", "method", "d"]),
        key=lambda group: (group[0][0], order[group[0][1]], group[0][2]),
    )
    return [
        f"| {SETTINGS[setting]} | {method} | {d} "
        f"| {100 * rows['mean'].mean():.1f} ± {100 * rows['mean'].std():.1f} "
        f"| {100 * rows['worst'].mean():.1f} |"
        for (setting, method, d), rows in groups
    ]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw one panel per setting, with one line per method."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    counts = sorted(set(table["d"]))
    for axes, (setting, what) in zip(panels, SETTINGS.items(), strict=True):
        for method, marker in zip(ADAPTERS, "os^v", strict=True):
            own = table[(table["setting"] == setting) & (table["method"] == method)]
            means = 100 * own.groupby("d")["mean"].agg(["mean", "std"])
            axes.errorbar(
                means.index, means["mean"], means["std"], marker=marker, capsize=3, label=method
            )
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(d) for d in counts])
        axes.minorticks_off()
        axes.set_xlabel("d, adapters on the server")
        axes.set_title(what, fontsize=9)
    panels[0].set_ylabel("test accuracy (%), mean over clients")
    panels[0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--ledgers", type=Path, default=RESULTS / "runs", help="folder of ledgers")
    parser.add_argument(
        "--runs", type=Path, default=HERE / "runs" / "adapters", help="folder of the runs"
    )
    parser.add_argument(
        "--write", action="store_true", help="write page and figure to benchmarks/results"
    )
    options = parser.parse_args()

    seeds = [int(seed) for seed in options.seeds.split(",")]
    done = {
        name: sweep(
            recipes(Setting(name, options.data), Ledger(options.ledgers / f"{name}.jsonl"), seeds),
            options.runs / name,
            on_run=lambda name, run, _: print(
                name, f"{run.summary['final']['served']['mean']:.3f}", flush=True
            ),
        )
        for name in SETTINGS
    }
    table = pd.concat([scores(name, runs) for name, runs in done.items()])
    page = (
        "# Accuracy against the number of adapters\n\n"
        "CIFAR-100 with 50 clients, without local finetuning. FedMerge has its defaults, but as "
        "many groups\nas adapters; the other methods are tuned at the d that the comparison chose. "
        "With d = 1, all are\nFedAvg. Values are mean ± std over seeds "
        f"{options.seeds}.\n\n"
        "![Accuracy against d](adapters.svg)\n\n"
        "| clients | method | d | accuracy, % | worst 10 % |\n|---|---|---|---|---|\n"
        + "\n".join(lines_of(table))
        + "\n\n"
        f"{stamp([run for runs in done.values() for run in runs.values()])}\n"
    )
    print(f"\n{page}")
    if options.write:
        (RESULTS / "adapters.md").write_text(page, encoding="utf-8")
        draw(table, RESULTS / "adapters.svg")


if __name__ == "__main__":
    main()

"""Measure what finetuning gains, and the local-global gap, after every round and for all methods.

    python benchmarks/quality/gaps.py text_tasks --data DATA --write

The methods have the values that the comparison chose (``quality.py``), so their searches in this
setting must have ended. Unlike in the comparison, every round scores each client's model before and
after local training. Several processes may share the work. The same command again runs only what is
left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from comparison import HERE, Setting, settings
from ledger import Ledger
from progress import progress
from provenance import RESULTS, stamp

from fedmerge_peft import Recipe, Run, sweep
from fedmerge_peft.analysis import local_global_gap

SCORED = ("evaluation.every=1", "evaluation.finetuned=true")
LAST = 3
"""Rounds at the end over which the table's values are means."""
PAGE = """# Finetuning gain and local-global gap: {setting}

The gain is the score of a client's model after local training minus the score of the model that it
was sent, in points. The gap compares a client's trained model of one round with the model that it
is sent in the next: the distance of the adapters, ‖·‖₂, and the score that is lost. Values are
means over clients, over the last {last} rounds, and over seeds {seeds} (± std over seeds).

![Gain and gap after each round](gaps_{setting}.svg)

| method | served, % | finetuning gain | gap in score | gap in distance |
|---|---|---|---|---|
{rows}

{stamp}
"""


def recipes(setting: Setting, ledger: Ledger, seeds: list[int]) -> dict[str, Recipe]:
    """Return the recipe of each method and seed, by name.

    Raises:
        SystemExit: The search of a method has not ended.
    """
    found = [progress(setting, method, ledger) for method in setting.methods.values()]
    found = [each for each in found if each.method.core]
    if waiting := [each.method.name for each in found if each.search.waiting]:
        raise SystemExit(
            f"{setting.name}: {', '.join(waiting)} not tuned yet; run quality.py run {setting.name}"
        )
    return {
        f"{each.method.name}-seed{seed}": setting.recipe(
            each.method, each.search.best, seed
        ).replace(SCORED)
        for seed in seeds
        for each in found
    }


def curves(name: str, run: Run) -> pd.DataFrame:
    """Return one row per round: method, seed, served score, finetuning gain, and the gaps."""
    method, _, seed = name.rpartition("-seed")
    table = local_global_gap(run)
    metric = next(column for column in table if column not in ("distance", "loss"))
    served = [record["served"]["mean"] for record in run.records]
    after = [record["finetuned"]["mean"] for record in run.records]
    return pd.DataFrame(
        {
            "method": method,
            "seed": int(seed),
            "round": table.index,
            "served": served,
            "gain": [trained - sent for trained, sent in zip(after, served, strict=True)],
            "gap": table[metric].to_numpy(),
            "distance": table["distance"].to_numpy(),
        }
    )


def rows_of(table: pd.DataFrame) -> list[str]:
    """Return the table's lines, the method with the best served score first."""
    last = table[table["round"] > table["round"].max() - LAST]
    by_seed = last.groupby(["method", "seed"])[["served", "gain", "gap", "distance"]].mean()
    means, spread = by_seed.groupby("method").mean(), by_seed.groupby("method").std()
    return [
        f"| {method} | {100 * row['served']:.1f} ± {100 * spread.loc[method, 'served']:.1f} "
        f"| {100 * row['gain']:.1f} ± {100 * spread.loc[method, 'gain']:.1f} "
        f"| {100 * row['gap']:.1f} ± {100 * spread.loc[method, 'gap']:.1f} "
        f"| {row['distance']:.3g} |"
        for method, row in means.sort_values("served", ascending=False).iterrows()
    ]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw gain and gap in score over the rounds, one line per method."""
    import matplotlib.pyplot as plt

    means = table.groupby(["method", "round"])[["gain", "gap"]].mean()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    titles = {"gain": "gained by local training", "gap": "lost from the trained to the next model"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for method in dict.fromkeys(table["method"]):
            values = 100 * means.loc[method, key]
            width = 2.5 if method == "fedmerge" else 1.0
            axes.plot(values.index, values, label=method, linewidth=width)
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("round")
    panels[0].set_ylabel("points of test accuracy")
    panels[1].legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", help="setting of the comparison, such as text_tasks")
    parser.add_argument("--data", type=Path, help="folder with the data files")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--ledgers", type=Path, default=RESULTS / "runs", help="folder of ledgers")
    parser.add_argument("--runs", type=Path, default=HERE / "runs" / "gaps", help="folder of runs")
    parser.add_argument("--pages", type=Path, default=RESULTS, help="folder of page and figure")
    parser.add_argument("--write", action="store_true", help="write page and figure")
    options = parser.parse_args()

    (setting,) = settings([options.setting], options.data)
    ledger = Ledger(options.ledgers / f"{setting.name}.jsonl")
    runs = sweep(
        recipes(setting, ledger, [int(seed) for seed in options.seeds.split(",")]),
        options.runs / setting.name,
        on_run=lambda name, run, _: print(name, f"{run.last_scores['mean']:.3f}", flush=True),
    )
    table = pd.concat([curves(name, run) for name, run in runs.items()])
    page = PAGE.format(
        setting=setting.name,
        last=LAST,
        seeds=options.seeds,
        rows="\n".join(rows_of(table)),
        stamp=stamp(list(runs.values())),
    )
    print(f"\n{page}")
    if options.write:
        (options.pages / f"gaps_{setting.name}.md").write_text(page, encoding="utf-8")
        draw(table, options.pages / f"gaps_{setting.name}.svg")


if __name__ == "__main__":
    main()

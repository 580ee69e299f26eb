"""Leave one client of each group out of a federation, then learn merging weights for it.

    python benchmarks/quality/newcomers.py text_tasks data.path=DATA/textcls.parquet \\
        data.partition.clients_per_value=5

Each newcomer learns from at most --examples examples and is evaluated on its own test examples. The
page compares its score with the scores of its group's participants on their test examples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from datasets import Dataset
from provenance import RESULTS, stamp

from fedmerge_peft import Recipe, Run, federate, personalize
from fedmerge_peft.data import Client, FederatedData, federate_data
from fedmerge_peft.engines.local import LocalEngine


def without_the_last(data: FederatedData) -> tuple[FederatedData, list[Client]]:
    """Split off the last client of each group: the data without these clients, and the clients."""
    last = {client.group: client for client in data.clients}
    out = {client.name for client in last.values()}
    return FederatedData(
        data.table, [client for client in data.clients if client.name not in out]
    ), list(last.values())


def examples_of(client: Client, table: Dataset, split_column: str, most: int) -> Dataset:
    """Return ``most`` training and all test examples of a client, marked in the split column."""
    learned, tested = client.train[:most], client.test
    rows = table.select(np.concatenate([learned, tested])).remove_columns([split_column])
    return rows.add_column(split_column, ["train"] * len(learned) + ["test"] * len(tested))


def one_seed(recipe: Recipe, out: Path, most: int) -> tuple[Run, list[dict[str, object]]]:
    """Run the federation without newcomers, or open a finished run; one row per newcomer."""
    data = federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed)
    federation, newcomers = without_the_last(data)
    run = (
        Run.open(out)
        if (out / "summary.json").exists()
        else federate(recipe, out, engine=LocalEngine.from_data(recipe, federation))
    )
    metric = run.recipe.task.metrics[0]
    took_part = run.clients.groupby("group")[f"test_{metric}"].mean()
    rows: list[dict[str, object]] = []
    for newcomer in newcomers:
        begin = time.perf_counter()
        examples = examples_of(newcomer, data.table, recipe.data.split_column or "split", most)
        found = personalize(run, examples, name=newcomer.name)
        wall = (
            time.perf_counter()
            - begin
            - sum(method.seconds for method in found.methods if method.name == "local training")
        )
        scores = {method.name: method.test[metric] for method in found.methods}
        seconds = next(
            method.seconds for method in found.methods if method.name == "learned weights"
        )
        rows.append(
            {
                "seed": recipe.seed,
                "group": newcomer.group,
                "participants": took_part[newcomer.group],
                **scores,
                "seconds": seconds,
                "wall": wall,
            }
        )
        print(
            f"seed {recipe.seed}  {newcomer.name}  {metric} {scores['learned weights']:.3f}, "
            f"participants of its group {took_part[newcomer.group]:.3f}"
        )
    return run, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a shipped recipe or a file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--examples", type=int, default=32, help="training examples of a newcomer, at most"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "runs" / "newcomers",
        help="folder of the runs",
    )
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/<recipe>_newcomers.md"
    )
    options = parser.parse_intermixed_args()

    name = Path(options.recipe).stem
    runs, rows = [], []
    for seed in options.seeds.split(","):
        recipe = Recipe.load(options.recipe, ["baselines=[]", *options.overrides, f"seed={seed}"])
        run, found = one_seed(recipe, options.out / f"{name}-seed{seed}", options.examples)
        runs.append(run)
        rows += found
    table = pd.DataFrame(rows)
    ways = [
        column for column in table.columns if column not in ("seed", "group", "seconds", "wall")
    ]
    by_seed = table.groupby("seed")[ways].mean()
    lines = [
        f"| {way} | {100 * by_seed[way].mean():.1f} ± {100 * by_seed[way].std():.1f} |"
        for way in ways
    ]
    behind = 100 * fmean(by_seed["participants"] - by_seed["learned weights"])
    page = (
        f"# {name}: newcomers\n\n"
        f"One client of each group did not take part, {len(table)} clients in all over seeds "
        f"{options.seeds}. Each of\n"
        f"them learned its merging weights from {options.examples} examples.\n\n"
        f"| adapter | {runs[0].recipe.task.metrics[0]}, mean ± std over seeds |\n|---|---|\n"
        + "\n".join(lines)
        + "\n\n"
        f"Learned weights are {behind:.1f} points behind the participants of the same group. "
        f"Learning takes a median\nof {table['seconds'].median():.1f} s "
        f"(at most {table['seconds'].max():.1f} s), and {table['wall'].median():.1f} s "
        f"(at most {table['wall'].max():.1f} s) if loading data and model is\n"
        f"included.\n\n{stamp(runs)}\n"
    )
    print(f"\n{page}")
    if options.write:
        (RESULTS / f"{name}_newcomers.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Leave one client of each group out of a federation, then give it an adapter by learning merging weights alone.

    python benchmarks/quality/newcomers.py text_tasks data.path=../shared/data/textcls.parquet data.partition.clients_per_value=5

Each newcomer learns from at most --examples examples and is scored on its own test examples, beside the clients of its group that took
part, scored on theirs. With --write the page goes to benchmarks/results/<recipe>_newcomers.md.
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
    """The federation without the last client of each group, and those clients."""
    last = {client.group: client for client in data.clients}
    out = {client.name for client in last.values()}
    return FederatedData(
        data.table, [client for client in data.clients if client.name not in out]
    ), list(last.values())


def examples_of(client: Client, table: Dataset, split_column: str, most: int) -> Dataset:
    """So many of the client's training examples, and all of its test examples, told apart by the split column."""
    learned, tested = client.train[:most], client.test
    rows = table.select(np.concatenate([learned, tested])).remove_columns([split_column])
    return rows.add_column(split_column, ["train"] * len(learned) + ["test"] * len(tested))


def one_seed(recipe: Recipe, out: Path, most: int) -> tuple[Run, list[dict[str, object]]]:
    """Run the federation without its newcomers (unless it is there already); a row of results for each newcomer."""
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
                "took part": took_part[newcomer.group],
                **scores,
                "seconds": seconds,
                "wall": wall,
            }
        )
        print(
            f"seed {recipe.seed}  {newcomer.name}  {metric} {scores['learned weights']:.3f}, of its kind {took_part[newcomer.group]:.3f}"
        )
    return run, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--examples", type=int, default=32, help="most examples that a newcomer learns from"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "runs" / "newcomers",
        help="folder of the runs",
    )
    parser.add_argument("--write", action="store_true")
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
    behind = 100 * fmean(by_seed["took part"] - by_seed["learned weights"])
    page = (
        f"# {name}: clients that were not there\n\n"
        f"One client of each group was left out, {len(table)} in all over seeds {options.seeds}, and learned its merging weights from "
        f"{options.examples} examples.\n\n"
        f"| way to an adapter | {runs[0].recipe.task.metrics[0]}, mean ± std over seeds |\n|---|---|\n"
        + "\n".join(lines)
        + "\n\n"
        f"Learned weights are {behind:.1f} points behind the clients of the same group that took part. Learning them took "
        f"{table['seconds'].median():.1f} s (median; at most {table['seconds'].max():.1f} s), with data and model loaded "
        f"{table['wall'].median():.1f} s (at most {table['wall'].max():.1f} s).\n\n{stamp(runs)}\n"
    )
    print(f"\n{page}")
    if options.write:
        (RESULTS / f"{name}_newcomers.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compare FedMerge with local training and FedAvg on the recipes of further tasks; write a page.

    python benchmarks/quality/further_tasks.py --data DATA --write
    python benchmarks/quality/further_tasks.py reading rounds=5 --data DATA --seeds 0

FedMerge has its one default, as in ``comparison.yaml``. Nothing is tuned by hand: each method
chooses its learning rate by the range test before its first round. The same command again runs only
what is left, so ``--write`` also makes the page of the finished runs alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from provenance import RESULTS, stamp

from fedmerge_peft import Comparison, Recipe, Run, expand, sweep
from fedmerge_peft.analysis.reports import markdown

RECIPES = (
    "entities_domains",
    "emotions_multilabel",
    "similarity_regression",
    "reading",
    "rewriting",
    "search_embeddings",
)
OVERRIDES = (
    "strategy=fedmerge,local,fedavg",
    "baselines=[]",
    "training.learning_rate=auto",
    "training.mixed_precision=no",
    "evaluation.every=1000",
    "evaluation.finetuned=false",
)
PAGE = """# Further tasks

FedMerge with its defaults, local training and FedAvg on shipped recipes of further tasks. All three
choose their learning rate by the range test; all else is the recipe's. Scores are means over the
clients' test examples, after the last round.

"""


def recipes(name: str, data: Path | None, seeds: str, overrides: list[str]) -> dict[str, Recipe]:
    """Return the recipes of all methods and seeds, by name.

    Args:
        name: Shipped recipe or file.
        data: Folder with the recipe's table; None for its own path.
        seeds: Seeds, separated by commas.
        overrides: Further overrides.
    """
    own = Path(Recipe.load(name).data.path)
    place = [] if data is None else [f"data.path={data / own.name}"]
    return expand(name, [*place, *OVERRIDES, f"seed={seeds}", *overrides])


def all_metrics(runs: Sequence[Run]) -> str:
    """Return a table of the test loss and all test metrics: means over clients, then over seeds."""
    by_method: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        scores = pd.DataFrame(run.scores().values()).filter(like="test_").mean()
        key = (run.recipe.name, run.recipe.strategy.name)
        by_method.setdefault(key, []).append(scores.to_dict())
    lines = ["| recipe | method | loss | metrics |", "|---|---|---|---|"]
    for (recipe, method), scores in by_method.items():
        means = pd.DataFrame(scores).mean().rename(lambda name: name.removeprefix("test_"))
        loss = means.pop("loss")
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        lines.append(f"| {recipe} | {method} | {loss:.4f} | {metrics} |")
    return "## Losses and all metrics\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="recipes, and overrides KEY=VALUE of all of them")
    parser.add_argument("--data", type=Path, help="folder with the tables")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("sweeps"), help="folder of the runs")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/further_tasks.md"
    )
    arguments = parser.parse_args()
    overrides = [name for name in arguments.names if "=" in name]
    runs = []
    for name in [name for name in arguments.names if "=" not in name] or RECIPES:
        begin, spent = time.monotonic(), time.process_time()
        done = sweep(
            recipes(name, arguments.data, arguments.seeds, overrides),
            arguments.out / Path(name).stem,
            on_round=lambda name, record: print(f"{name}  {record}", flush=True),
        )
        runs += done.values()
        print(
            f"{name}: {len(done)} runs, {time.monotonic() - begin:.0f} s, "
            f"{time.process_time() - spent:.0f} processor seconds",
            flush=True,
        )
    page = f"{PAGE}{markdown(Comparison.of(runs))}\n{all_metrics(runs)}\n\n{stamp(runs)}\n"
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / "further_tasks.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

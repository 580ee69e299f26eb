"""Tune every method with the same budget, then compare the methods on other seeds.

    python benchmarks/quality/quality.py text_tasks --data DATA
    python benchmarks/quality/quality.py text_tasks --data DATA --methods fedmerge,fedavg,local

A setting is a YAML file beside this program: a shipped recipe, overrides, and the same number of
candidates for each method. The candidate with the best mean validation score on the tuning seed is
run with the other seeds. The page reports test scores of the served adapters after the last round.
Runs are kept in benchmarks/quality/runs, so that the same command again runs only what is left.
Several processes may share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import yaml
from provenance import RESULTS, stamp

from fedmerge_peft import Comparison, Recipe, Run, sweep
from fedmerge_peft.analysis import sharing
from fedmerge_peft.analysis.figures import plot
from fedmerge_peft.analysis.reports import markdown
from fedmerge_peft.tasks.metrics import greater_is_better

HERE = Path(__file__).resolve().parent


class Setting:
    """A recipe and the candidates of each method."""

    def __init__(self, name: str, data: Path) -> None:
        self.name = name
        text = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
        self.base = [*text.get("overrides", []), f"data.path={data / text['data']}", "baselines=[]"]
        self.source = text["recipe"]
        self.tuning_seed: int | None = text.get("tuning_seed")
        self.names_strategies = "methods" in text
        """False if the candidates are variants of the recipe's own strategy, one per variant."""
        self.candidates: dict[str, list[list[str]]] = text.get("methods") or {
            name: [each] for name, each in text["variants"].items()
        }
        if len({len(each) for each in self.candidates.values()}) != 1:
            raise SystemExit(
                f"{name}.yaml: every method must have as many candidates as the others"
            )

    def recipe(self, method: str, candidate: int, seed: int) -> Recipe:
        changes = self.candidates[method][candidate]
        named = [f"strategy={method}"] if self.names_strategies else []
        return Recipe.load(self.source, [*self.base, *named, f"seed={seed}", *changes])


def validation(run: Run) -> float:
    """Return the clients' mean validation score by the first metric; greater is better."""
    metric = run.recipe.task.metrics[0]
    clients = run.summary["final"]["served"]["clients"].values()
    return (1 if greater_is_better(metric) else -1) * fmean(
        scores[f"validation_{metric}"] for scores in clients
    )


def shared(runs: Mapping[str, Run]) -> str:
    """Return a table of the groups whose clients share an adapter, for the runs of fedmerge."""
    lines = []
    for name, run in runs.items():
        if run.recipe.strategy.name == "fedmerge" and run.clients["group"].nunique() > 1:
            found = sharing(run)
            both = sorted(
                {
                    " + ".join(sorted([str(group), *others.split(", ")]))
                    for group, others in found["others"].items()
                    if others
                }
            )
            on_it = (found["share"] * found["clients"]).sum() / found["clients"].sum()
            lines.append(f"| {name} | {100 * on_it:.0f} % | {', '.join(both) or 'none'} |")
    head = (
        "| run | clients on the main adapter of their group | groups that share an adapter |\n"
        "|---|---|---|\n"
    )
    return head + "\n".join(lines) + "\n\n" if lines else ""


def report(name: str, run: Run, fresh: bool) -> None:
    final = run.summary["final"]["served"]
    print(
        f"{name:28} {final['metric']} {final['mean']:.3f}  worst {final['worst']:.3f}"
        f"{'' if fresh else '  (kept)'}",
        flush=True,
    )


def by_variant(comparison: Comparison, runs: Mapping[str, Run]) -> Comparison:
    """Name methods by their variants instead of by all the keys in which they differ."""
    variant = {str(run.path): name.rpartition("-seed")[0] for name, run in runs.items()}
    names = {row.method: variant[str(row.path)] for row in comparison.runs.itertuples()}
    frames = {
        part: getattr(comparison, part).replace({"method": names})
        for part in ("runs", "curves", "methods")
    }
    return replace(comparison, **frames)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", help="a YAML file beside this program, without .yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument(
        "--methods", help="methods, separated by commas; default: all of the setting"
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="folder of the runs")
    parser.add_argument(
        "--write", action="store_true", help="write page, table and figure to benchmarks/results"
    )
    arguments = parser.parse_args()

    setting = Setting(arguments.setting, arguments.data)
    methods = arguments.methods.split(",") if arguments.methods else list(setting.candidates)
    if unknown := [method for method in methods if method not in setting.candidates]:
        raise SystemExit(
            f"{setting.name}.yaml has no {', '.join(unknown)}; "
            f"it has {', '.join(setting.candidates)}"
        )
    page_path = RESULTS / f"{setting.name}.md"
    if arguments.write and page_path.exists():
        written = [
            method
            for method in setting.candidates
            if f"\n| {method} |" in page_path.read_text(encoding="utf-8")
        ]
        if lost := [method for method in written if method not in methods]:
            raise SystemExit(
                f"{page_path}: --write would remove {', '.join(lost)}; add them to --methods"
            )
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if setting.tuning_seed in seeds:
        raise SystemExit(f"--seeds: {setting.tuning_seed} is the tuning seed; choose other seeds")
    out = arguments.runs / setting.name

    budget = range(len(setting.candidates[methods[0]]))
    chosen_from = methods if len(budget) > 1 else []
    trials = {
        f"{method}-{number}": setting.recipe(method, number, setting.tuning_seed)
        for method in chosen_from
        for number in budget
    }
    tuned = sweep(trials, out / "tuning", on_run=report) if trials else {}
    best = dict.fromkeys(methods, 0)
    for method in methods if tuned else []:
        best[method] = max(
            budget, key=lambda number, method=method: validation(tuned[f"{method}-{number}"])
        )
    finals = {
        f"{method}-seed{seed}": setting.recipe(method, best[method], seed)
        for seed in seeds
        for method in methods
    }
    runs = sweep(finals, out / "final", on_run=report)

    comparison = Comparison.of(runs.values())
    if not setting.names_strategies:
        comparison = by_variant(comparison, runs)
    left_out = ", ".join(method for method in setting.candidates if method not in methods)
    missing = f"Not run yet: {left_out}. " if left_out else ""
    chosen = "\n".join(
        f"| {method} | {' '.join(setting.candidates[method][best[method]]) or 'defaults'} |"
        for method in methods
    )
    tuning = (
        f"Each method was tuned over {len(budget)} candidates by the mean validation score on seed "
        f"{setting.tuning_seed}. "
        if tuned
        else ""
    )
    page = (
        f"# {setting.name}\n\n{markdown(comparison)}\n"
        f"{missing}"
        f"{tuning}The table has seeds {arguments.seeds}.\n\n"
        f"| method | settings |\n|---|---|\n{chosen}\n\n"
        f"{shared(runs)}"
        f"{stamp([*tuned.values(), *runs.values()])}\n"
    )
    print(f"\n{page}")
    if arguments.write:
        page_path.write_text(page, encoding="utf-8")
        comparison.methods.to_csv(RESULTS / f"{setting.name}.csv", index=False)
        plot(comparison, RESULTS / f"{setting.name}.svg")


if __name__ == "__main__":
    main()

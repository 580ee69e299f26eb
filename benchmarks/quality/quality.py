"""Tune every method with the same budget, then compare them on seeds that the tuning did not see.

    python benchmarks/quality/quality.py text_tasks --data ../shared/data
    python benchmarks/quality/quality.py text_tasks --data ../shared/data --methods fedmerge,fedavg,local

A setting is a YAML file beside this program: a shipped recipe, what to change in it, and for each method the candidates to choose
from, as many for each. The candidate with the best mean validation score on the tuning seed is run with the other seeds; what is
reported are test scores of what clients are served with after the last round. Runs go to benchmarks/quality/runs, so that the same
command again only does what is left; several processes may share the work. With --write, and all methods, the tables and the figure
are put into benchmarks/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import yaml
from provenance import RESULTS, stamp

from fedmerge_peft import Comparison, Recipe, Run, sweep
from fedmerge_peft.analysis.figures import plot
from fedmerge_peft.analysis.reports import markdown
from fedmerge_peft.tasks.metrics import greater_is_better

HERE = Path(__file__).resolve().parent


class Setting:
    """A recipe, and each method's candidates."""

    def __init__(self, name: str, data: Path) -> None:
        self.name = name
        text = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
        self.base = [*text.get("overrides", []), f"data.path={data / text['data']}", "baselines=[]"]
        self.source = text["recipe"]
        self.tuning_seed: int = text["tuning_seed"]
        self.candidates: dict[str, list[list[str]]] = text["methods"]
        if len({len(each) for each in self.candidates.values()}) != 1:
            raise SystemExit(f"{name}.yaml: every method must have as many candidates as the others")

    def recipe(self, method: str, candidate: int, seed: int) -> Recipe:
        changes = self.candidates[method][candidate]
        return Recipe.load(self.source, [*self.base, f"strategy={method}", f"seed={seed}", *changes])


def validation(run: Run) -> float:
    """Mean over the clients of the first metric on their validation examples, greater is better."""
    metric = run.recipe.task.metrics[0]
    clients = run.summary["final"]["served"]["clients"].values()
    return (1 if greater_is_better(metric) else -1) * fmean(scores[f"validation_{metric}"] for scores in clients)


def report(name: str, run: Run, fresh: bool) -> None:
    final = run.summary["final"]["served"]
    print(f"{name:28} {final['metric']} {final['mean']:.3f}  worst {final['worst']:.3f}{'' if fresh else '  (there already)'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data")
    parser.add_argument("--methods", help="some of the setting's methods; by default all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    setting = Setting(arguments.setting, arguments.data)
    methods = arguments.methods.split(",") if arguments.methods else list(setting.candidates)
    if unknown := [method for method in methods if method not in setting.candidates]:
        raise SystemExit(f"{setting.name}.yaml has no {', '.join(unknown)}; it has {', '.join(setting.candidates)}")
    if arguments.write and set(methods) != set(setting.candidates):
        raise SystemExit(
            f"--write needs all methods of {setting.name}.yaml, as its table replaces that of all; leave out --methods, or --write"
        )
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if setting.tuning_seed in seeds:
        raise SystemExit(f"seed {setting.tuning_seed} is for tuning")
    out = arguments.runs / setting.name

    budget = range(len(setting.candidates[methods[0]]))
    trials = {f"{method}-{number}": setting.recipe(method, number, setting.tuning_seed) for method in methods for number in budget}
    tuned = sweep(trials, out / "tuning", on_run=report)
    best = {method: max(budget, key=lambda number, method=method: validation(tuned[f"{method}-{number}"])) for method in methods}
    finals = {f"{method}-seed{seed}": setting.recipe(method, best[method], seed) for seed in seeds for method in methods}
    runs = sweep(finals, out / "final", on_run=report)

    comparison = Comparison.of(runs.values())
    chosen = "\n".join(f"| {method} | {' '.join(setting.candidates[method][best[method]]) or 'defaults'} |" for method in methods)
    page = (
        f"# {setting.name}\n\n{markdown(comparison)}\n"
        f"Each method chose one of {len(budget)} candidates by the mean validation score on seed {setting.tuning_seed}; "
        f"the table is on seeds {arguments.seeds}.\n\n| method | chosen |\n|---|---|\n{chosen}\n\n"
        f"{stamp([*tuned.values(), *runs.values()])}\n"
    )
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / f"{setting.name}.md").write_text(page, encoding="utf-8")
        comparison.methods.to_csv(RESULTS / f"{setting.name}.csv", index=False)
        plot(comparison, RESULTS / f"{setting.name}.svg")


if __name__ == "__main__":
    main()

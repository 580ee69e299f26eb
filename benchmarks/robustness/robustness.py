"""How well honest clients fare beside hostile ones, with and without a defence; prints the table, and where and how it was made.

    python benchmarks/robustness/robustness.py benchmarks/robustness/quickstart.yaml --write quickstart
    python benchmarks/robustness/robustness.py quickstart training.clients_per_batch=4 --attacks "sign flip" --fractions 0.2

The same clients are hostile under every attack and defence; a cell is the final mean score of the others,
and in brackets its part of what the same clients have when nobody is hostile and nothing is defended. All cells skip failing clients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

from attacks import ATTACKS, attacked, attackers

from fedmerge_peft import Recipe, Run, federate
from fedmerge_peft.engines.local import LocalEngine

sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))
from provenance import RESULTS, stamp

DEFENCES = {
    "none": [],
    "norm bound": ["robustness.norm_multiple=1"],
    "median": ["robustness.aggregation=median"],
    "trimmed mean": ["robustness.aggregation=trimmed_mean", "robustness.trim=0.2"],
    "Krum": ["robustness.aggregation=krum", "robustness.malicious=0.35"],
    "multi-Krum": ["robustness.aggregation=multi_krum", "robustness.malicious=0.35"],
    "cosine filter": ["robustness.aggregation=cosine_filter"],
    "norm bound and cosine filter": [
        "robustness.norm_multiple=1",
        "robustness.aggregation=cosine_filter",
    ],
    "norm bound and median": ["robustness.norm_multiple=1", "robustness.aggregation=median"],
    "norm bound and trimmed mean": [
        "robustness.norm_multiple=1",
        "robustness.aggregation=trimmed_mean",
        "robustness.trim=0.2",
    ],
}


class Cells:
    """Final mean scores of honest clients, %, one seed at a time; data and model are loaded once a seed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.engine = LocalEngine.from_recipe(recipe)
        self.runs: list[Run] = []
        self.clean: dict[str, dict[str, float]] = {}

    def run(
        self, defence: str, attack: str | None = None, fraction: float = 0.0
    ) -> dict[str, float]:
        """The final score of every client, by name."""
        hostile = attackers(len(self.engine.clients), fraction, self.recipe.seed)
        used = (
            attacked(self.engine, ATTACKS[attack], hostile, self.recipe.seed)
            if attack
            else self.engine
        )
        self.runs.append(
            federate(
                self.recipe.replace(DEFENCES[defence]),
                self.folder / str(len(self.runs)),
                engine=used,
            )
        )
        served = self.runs[-1].summary["final"]["served"]
        print(
            f"seed {self.recipe.seed}, {attack or 'nobody'} {fraction:.0%}, {defence}: {served['mean']:.3f}",
            flush=True,
        )
        return {name: found[served["metric"]] for name, found in served["clients"].items()}

    def undisturbed(self, defence: str, fraction: float = 0.0) -> float:
        """Of those who would be honest at this fraction, where nobody is hostile."""
        if defence not in self.clean:
            self.clean[defence] = self.run(defence)
        return self._honest(self.clean[defence], fraction)

    def disturbed(self, defence: str, attack: str, fraction: float) -> float:
        return self._honest(self.run(defence, attack, fraction), fraction)

    def _honest(self, found: dict[str, float], fraction: float) -> float:
        hostile = {
            self.engine.clients[client].name
            for client in attackers(len(self.engine.clients), fraction, self.recipe.seed)
        }
        return 100 * fmean(score for name, score in found.items() if name not in hostile)


def said(found: Sequence[float]) -> str:
    return f"{fmean(found):.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--fractions", default="0.1,0.3")
    parser.add_argument("--defences", default=",".join(DEFENCES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--write", metavar="NAME", help="write benchmarks/results/robustness_NAME.md"
    )
    arguments = parser.parse_intermixed_args()
    defences = arguments.defences.split(",")
    with TemporaryDirectory() as folder:
        seeds = [
            Cells(
                Recipe.load(
                    arguments.recipe,
                    [*arguments.overrides, "baselines=[]", "clients.failures=skip", f"seed={seed}"],
                ),
                Path(folder, seed),
            )
            for seed in arguments.seeds.split(",")
        ]
        lines = [["hostile", "clients", *defences], ["---"] * (2 + len(defences))]
        lines.append(
            [
                "nobody",
                "0 %",
                *(said([cells.undisturbed(defence) for cells in seeds]) for defence in defences),
            ]
        )
        for attack in arguments.attacks.split(","):
            for fraction in map(float, arguments.fractions.split(",")):
                best = fmean(cells.undisturbed("none", fraction) for cells in seeds)
                found = [
                    [cells.disturbed(defence, attack, fraction) for cells in seeds]
                    for defence in defences
                ]
                lines.append(
                    [
                        attack,
                        f"{100 * fraction:.0f} %",
                        *(f"{said(each)} ({fmean(each) / best:.0%})" for each in found),
                    ]
                )
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        first = seeds[0]
        what = f"{first.recipe.strategy.name}, {len(first.engine.clients)} clients, {first.recipe.rounds} rounds, seeds {arguments.seeds}"
        page = (
            f"# Hostile clients: {first.recipe.name}\n\n"
            f"{what}. Mean accuracy, %, of the honest clients, mean ± std over seeds; in brackets the part of what the same\n"
            "clients have when nobody is hostile and nothing is defended.\n\n"
            f"{table}\n\n{stamp([run for cells in seeds for run in cells.runs])}\n"
        )
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / f"robustness_{arguments.write}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measure honest clients' scores under attacks, with and without defenses.

    python benchmarks/robustness/robustness.py benchmarks/robustness/quickstart.yaml
    python benchmarks/robustness/robustness.py quickstart --attacks "sign flip" --fractions 0.2

The same clients are hostile under every attack and defense. A cell is the final mean score of the
other clients, with its ratio to the score of the same clients without attack and defense in
brackets. All runs skip failing clients.
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

DEFENSES = {
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
    "norm bound and similarity filter": [
        "robustness.norm_multiple=1",
        "robustness.aggregation=similarity_filter",
    ],
    "norm bound and median": ["robustness.norm_multiple=1", "robustness.aggregation=median"],
    "norm bound and trimmed mean": [
        "robustness.norm_multiple=1",
        "robustness.aggregation=trimmed_mean",
        "robustness.trim=0.2",
    ],
}


class Cells:
    """Final mean scores of honest clients in %, for one seed; data and model are loaded once."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.engine = LocalEngine.from_recipe(recipe)
        self.runs: list[Run] = []
        self.clean: dict[str, dict[str, float]] = {}

    def run(
        self, defense: str, attack: str | None = None, fraction: float = 0.0
    ) -> dict[str, float]:
        """Run a federation; return the final score of every client by name."""
        hostile = attackers(len(self.engine.clients), fraction, self.recipe.seed)
        used = (
            attacked(self.engine, ATTACKS[attack], hostile, self.recipe.seed)
            if attack
            else self.engine
        )
        self.runs.append(
            federate(
                self.recipe.replace(DEFENSES[defense]),
                self.folder / str(len(self.runs)),
                engine=used,
            )
        )
        served = self.runs[-1].summary["final"]["served"]
        print(
            f"seed {self.recipe.seed}, {attack or 'no attack'} {fraction:.0%}, {defense}: "
            f"{served['mean']:.3f}",
            flush=True,
        )
        return {name: found[served["metric"]] for name, found in served["clients"].items()}

    def undisturbed(self, defense: str, fraction: float = 0.0) -> float:
        """Return the score without attack, of the clients that are honest at this fraction."""
        if defense not in self.clean:
            self.clean[defense] = self.run(defense)
        return self._honest(self.clean[defense], fraction)

    def disturbed(self, defense: str, attack: str, fraction: float) -> float:
        """Return the score under an attack, of the honest clients."""
        return self._honest(self.run(defense, attack, fraction), fraction)

    def _honest(self, found: dict[str, float], fraction: float) -> float:
        hostile = {
            self.engine.clients[client].name
            for client in attackers(len(self.engine.clients), fraction, self.recipe.seed)
        }
        return 100 * fmean(score for name, score in found.items() if name not in hostile)


def mean_and_std(scores: Sequence[float]) -> str:
    return f"{fmean(scores):.1f}" + (f" ± {stdev(scores):.1f}" if len(scores) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a shipped recipe or a file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="default: all")
    parser.add_argument("--fractions", default="0.1,0.3", help="fractions of hostile clients")
    parser.add_argument("--defenses", default=",".join(DEFENSES), help="default: all")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--write", metavar="NAME", help="write benchmarks/results/robustness_NAME.md"
    )
    arguments = parser.parse_intermixed_args()
    defenses = arguments.defenses.split(",")
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
        lines = [["attack", "hostile clients", *defenses], ["---"] * (2 + len(defenses))]
        lines.append(
            [
                "none",
                "0 %",
                *(
                    mean_and_std([cells.undisturbed(defense) for cells in seeds])
                    for defense in defenses
                ),
            ]
        )
        for attack in arguments.attacks.split(","):
            for fraction in map(float, arguments.fractions.split(",")):
                best = fmean(cells.undisturbed("none", fraction) for cells in seeds)
                found = [
                    [cells.disturbed(defense, attack, fraction) for cells in seeds]
                    for defense in defenses
                ]
                lines.append(
                    [
                        attack,
                        f"{100 * fraction:.0f} %",
                        *(f"{mean_and_std(each)} ({fmean(each) / best:.0%})" for each in found),
                    ]
                )
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        first = seeds[0]
        what = (
            f"{first.recipe.strategy.name}, {len(first.engine.clients)} clients, "
            f"{first.recipe.rounds} rounds, seeds {arguments.seeds}"
        )
        page = (
            f"# Hostile clients: {first.recipe.name}\n\n"
            f"{what}. Mean accuracy of the honest clients in %, mean ± std over\n"
            "seeds; in brackets, the ratio to the accuracy of the same clients without attack and "
            "defense.\n\n"
            f"{table}\n\n{stamp([run for cells in seeds for run in cells.runs])}\n"
        )
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / f"robustness_{arguments.write}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

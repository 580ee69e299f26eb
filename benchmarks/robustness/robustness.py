"""How well honest clients fare beside hostile ones, with and without a defence; prints the table, and where and how it was made.

    python benchmarks/robustness/robustness.py benchmarks/robustness/quickstart.yaml --write
    python benchmarks/robustness/robustness.py quickstart training.clients_per_batch=4 --attacks "sign flip" --fractions 0.2

Data and model are loaded once. The same clients are hostile under every attack and defence; a cell is the final mean score of the others,
and in brackets its part of what the same clients have when nobody is hostile and nothing is defended. All cells skip failing clients.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from attacks import ATTACKS, attacked, attackers

from fedmerge_peft import Recipe, Run, federate
from fedmerge_peft.engines.local import LocalEngine

DEFENCES = {
    "none": [],
    "norm bound": ["defence.norm_multiple=1"],
    "median": ["defence.aggregation=median"],
    "trimmed mean": ["defence.aggregation=trimmed_mean", "defence.trim=0.2"],
    "Krum": ["defence.aggregation=krum", "defence.malicious=0.35"],
    "multi-Krum": ["defence.aggregation=multi_krum", "defence.malicious=0.35"],
    "norm bound and median": ["defence.norm_multiple=1", "defence.aggregation=median"],
    "norm bound and trimmed mean": ["defence.norm_multiple=1", "defence.aggregation=trimmed_mean", "defence.trim=0.2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--fractions", default="0.1,0.3")
    parser.add_argument("--defences", default=",".join(DEFENCES))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/robustness_<recipe>.md")
    arguments = parser.parse_intermixed_args()
    base = Recipe.load(arguments.recipe, [*arguments.overrides, "baselines=[]", "clients.failures=skip"])
    engine = LocalEngine.from_recipe(base)
    runs: list[Run] = []
    with TemporaryDirectory() as folder:

        def scores(defence: str, attack: str | None = None, fraction: float = 0.0) -> dict[str, float]:
            """The final score of every client, by index."""
            hostile = attackers(len(engine.clients), fraction, base.seed)
            used = attacked(engine, ATTACKS[attack], hostile, base.seed) if attack else engine
            runs.append(federate(base.replace(DEFENCES[defence]), Path(folder, str(len(runs))), engine=used))
            served = runs[-1].summary["final"]["served"]
            print(f"{attack or 'nobody'} {fraction:.0%}, {defence}: {served['mean']:.3f}", flush=True)
            return {name: found[served["metric"]] for name, found in served["clients"].items()}

        def honest(found: dict[str, float], fraction: float) -> float:
            hostile = {engine.clients[client].name for client in attackers(len(engine.clients), fraction, base.seed)}
            return fmean(score for name, score in found.items() if name not in hostile)

        defences = arguments.defences.split(",")
        clean = {defence: scores(defence) for defence in dict.fromkeys(["none", *defences])}
        lines = [["hostile", "clients", *defences], ["---"] * (2 + len(defences))]
        lines.append(["nobody", "0 %", *(f"{100 * honest(clean[defence], 0.0):.1f}" for defence in defences)])
        for attack in arguments.attacks.split(","):
            for fraction in map(float, arguments.fractions.split(",")):
                best = honest(clean["none"], fraction)
                found = [honest(scores(defence, attack, fraction), fraction) for defence in defences]
                lines.append([attack, f"{fraction:.0%}".replace("%", " %"), *(f"{100 * one:.1f} ({one / best:.0%})" for one in found)])
        from provenance import RESULTS, stamp  # beside the programs that measure quality

        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        page = f"{table}\n\n{stamp(runs)}\n"
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / f"robustness_{Path(arguments.recipe).stem}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    import sys

    sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))
    main()

"""Measure defenses against colluders on real texts with LoRA, and write a page.

    python benchmarks/robustness/colluders_text.py --data ../shared/data/textcls.parquet --write

Thirty clients with a small model (``text_clients.py``) run ten rounds: FedAvg with clients of one
task, and FedMerge with three tasks of ten clients each, which share label numbers and contradict
each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from attacks import attackers
from collusion import adapted, alternating, honest, identical, sideways, takeover
from text_clients import (
    Attack,
    accuracies,
    attacked,
    averaged_words,
    of_the_victims,
    trigger_rate,
    with_trigger,
)

from fedmerge_peft import Recipe
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.federation.loop import Federation

sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))
from provenance import RESULTS, stamp_process

CLIENTS, FRACTIONS = 30, (0.1, 0.2, 0.3)
FEDERATIONS = {
    "FedAvg, one task": ("fedavg", ["snips"]),
    "FedMerge, three tasks": ("{name: fedmerge, adapters: 5}", ["snips", "ag_news", "trec6"]),
}
VICTIMS = "trec6"
"""Task whose adapter a takeover aims at."""
COLLUSIONS: dict[str, dict[str, Any]] = {
    "identical vectors": {"send": identical},
    "alternating": {"send": alternating},
    "adapted to defense": {"send": adapted},
    "sideways": {"send": sideways},
    "takeover": {"send": takeover, "poison": of_the_victims(VICTIMS)},
    "backdoor": {"send": honest, "poison": with_trigger},
}
_BOUND = "robustness.norm_multiple=1"
DEFENSES = {
    "none": [],
    "cosine filter": [_BOUND, "robustness.aggregation=cosine_filter"],
    "similarity filter": [_BOUND, "robustness.aggregation=similarity_filter"],
}
"""Defenses; all but none clip updates to the median norm."""


def recipe(strategy: str, tasks: Sequence[str], model: str, seed: int, data: str) -> Recipe:
    """Return the recipe of thirty clients with 30 training examples each."""
    return Recipe.load(
        "text_tasks",
        [
            f"seed={seed}",
            f"backbone.model={model}",
            f"data.path={data}",
            f"data.filter.task=[{', '.join(tasks)}]",
            f"data.partition.clients_per_value={CLIENTS // len(tasks)}",
            "data.max_train=30",
            "data.validation_fraction=0",
            "data.max_test=40",
            "lora={r: 8, target_modules: [hidden]}",
            f"strategy={strategy}",
            "baselines=[]",
            "rounds=10",
            "task.max_length=20",
            "training.device=cpu",
            "training.learning_rate=0.05",
            "training.batch_size=10",
            "training.epochs=2",
            "training.clients_per_batch=30",
            "evaluation.every=100",
            "evaluation.finetuned=false",
            "evaluation.batch_size=64",
        ],
    )


class Cells:
    """Outcomes of one federation and seed; model and data are loaded once."""

    def __init__(self, title: str, model: str, seed: int, data: str) -> None:
        strategy, tasks = FEDERATIONS[title]
        self.recipe = recipe(strategy, tasks, model, seed, data)
        self.engine = LocalEngine.from_recipe(self.recipe)
        self.groups = np.array([client.group for client in self.engine.clients])

    def outcome(
        self, defense: str, attack: str | None = None, fraction: float = 0.0
    ) -> dict[str, float]:
        """Run a federation; return the honest clients' scores after its last round, in %."""
        seed = self.recipe.seed
        hostile = attackers(CLIENTS, fraction, seed) if attack else []
        used = self.engine
        if attack is not None:
            used = attacked(self.engine, Attack(hostile, **COLLUSIONS[attack]), seed)
        federation = Federation(self.recipe.replace(DEFENSES[defense]), used)
        for _ in federation.rounds():
            pass
        kept = [client for client in range(CLIENTS) if client not in hostile]
        found = accuracies(self.engine, federation)[kept]
        groups = self.groups[kept]
        worst = min(found[groups == group].mean() for group in set(groups.tolist()))
        result = {"accuracy": 100 * float(found.mean()), "worst": 100 * float(worst)}
        if attack in (None, "backdoor"):
            result["trigger"] = 100 * trigger_rate(self.engine, federation, kept)
        return result


def measure(
    titles: Sequence[str], seeds: Sequence[int], data: str, ledger: Path
) -> dict[str, dict[str, float]]:
    """Run what the ledger lacks; return all outcomes by title, seed, defense, attack, fraction."""
    lines = ledger.read_text().splitlines() if ledger.is_file() else []
    found: dict[str, dict[str, float]] = dict(map(json.loads, lines))
    model = averaged_words(7)
    for title in titles:
        cases = [(None, 0.0), *((a, f) for a in COLLUSIONS for f in FRACTIONS)]
        if len(FEDERATIONS[title][1]) == 1:
            cases = [case for case in cases if case[0] != "takeover"]
        for defense in reversed(DEFENSES):
            for seed in seeds:
                cells = None
                for attack, fraction in cases:
                    key = json.dumps([title, seed, defense, attack, fraction])
                    if key in found:
                        continue
                    cells = cells or Cells(title, model.name, seed, data)
                    found[key] = cells.outcome(defense, attack, fraction)
                    print(key, found[key], flush=True)
                    with ledger.open("a") as file:
                        file.write(json.dumps([key, found[key]]) + "\n")
    return found


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def page(found: dict[str, dict[str, float]], seeds: Sequence[int]) -> str:
    """Return the page of all outcomes."""

    def values(title: str, defense: str, attack: str | None, fraction: float, what: str) -> list:
        return [found[json.dumps([title, seed, defense, attack, fraction])][what] for seed in seeds]

    def table(title: str, attacks: Sequence[str | None], what: str) -> str:
        lines = [["attack", "colluders", *DEFENSES], ["---"] * (2 + len(DEFENSES))]
        for attack in (None, *attacks):
            for fraction in FRACTIONS if attack else (0.0,):
                cells = []
                for defense in DEFENSES:
                    cell = spread(values(title, defense, attack, fraction, what))
                    if what == "accuracy" and title.startswith("FedMerge"):
                        worst = values(title, defense, attack, fraction, "worst")
                        cell += f" ({fmean(worst):.1f})"
                    cells.append(cell)
                lines.append([attack or "none", f"{100 * fraction:.0f} %", *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    one, three = FEDERATIONS
    shared = [attack for attack in COLLUSIONS if attack != "takeover"]
    return (
        "# Colluding clients on real texts\n\n"
        f"{CLIENTS} clients with 30 training texts each, LoRA of rank 8 on a small model "
        f"(`text_clients.py`),\n10 rounds, seeds {', '.join(map(str, seeds))}. All defenses but "
        "none clip updates to the median norm (`norm_multiple: 1`).\nAccuracy of the honest "
        "clients in %, mean ± std over seeds.\n\n"
        f"## {one}\n\n{table(one, shared, 'accuracy')}\n\n"
        f"## {three}\n\nIn brackets, the mean of the worst task.\n\n"
        f"{table(three, list(COLLUSIONS), 'accuracy')}\n\n"
        "## Backdoor\n\nTexts with the trigger that get the target label, in %, of the honest "
        "clients' texts\nwith other labels.\n\n"
        f"### {one}\n\n{table(one, ['backdoor'], 'trigger')}\n\n"
        f"### {three}\n\n{table(three, ['backdoor'], 'trigger')}\n\n"
        f"{stamp_process()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data/textcls.parquet", help="the table")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--ledger", type=Path, default=Path("colluders_text.jsonl"), help="outcomes so far"
    )
    parser.add_argument(
        "--write", action="store_true", help="write results/robustness_colluders_text.md"
    )
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    text = page(measure(list(FEDERATIONS), seeds, arguments.data, arguments.ledger), seeds)
    print(f"\n{text}")
    if arguments.write:
        (RESULTS / "robustness_colluders_text.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

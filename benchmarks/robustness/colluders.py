"""Measure defenses against colluders on clients with made data, and write a page.

    python benchmarks/robustness/colluders.py --write

Thirty clients with a small model (``made_clients.py``) run ten rounds through the package's own
round loop, strategies and aggregation rules: FedAvg with clients that are alike, and FedMerge with
three groups of 12, 10 and 8 clients whose labels contradict each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import bulyan
import fltrust
import foolsgold
import torch
from attacks import attackers
from collusion import COLLUSIONS
from made_clients import MadeClients

from fedmerge_peft import Recipe
from fedmerge_peft.federation.loop import Federation

sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))
from provenance import RESULTS, stamp_process

ROUNDS, CLIENTS = 10, 30
FRACTIONS = (0.1, 0.2, 0.3)
SHARED = ("FedAvg, one group", "fedavg", (30,))
GROUPED = ("FedMerge, three groups", "{name: fedmerge, adapters: 5}", (12, 10, 8))
_BOUND = "robustness.norm_multiple=1"
DEFENSES = {
    "none": [],
    "cosine filter": [_BOUND, "robustness.aggregation=cosine_filter"],
    "multi-Krum": [_BOUND, "robustness.aggregation=multi_krum", "robustness.malicious=0.35"],
    "FoolsGold": [_BOUND, f"robustness.aggregation={foolsgold.foolsgold.__name__}"],
    "Bulyan": [_BOUND, f"robustness.aggregation={bulyan.bulyan.__name__}"],
    "FLTrust": [_BOUND, f"robustness.aggregation={fltrust.fltrust.__name__}"],
    "similarity filter": [_BOUND, "robustness.aggregation=similarity_filter"],
}
"""Defenses; all but none clip updates to the median norm."""


@dataclass(frozen=True)
class Outcome:
    """Means over honest clients, in %."""

    accuracy: float
    groups: list[float]
    """Accuracy of each group."""
    trigger: float
    """Inputs with the trigger that get the target."""


def outcome(
    strategy: str,
    groups: Sequence[int],
    defense: Sequence[str],
    seed: int,
    attack: str | None = None,
    fraction: float = 0.0,
) -> Outcome:
    """Run a federation; return the honest clients' scores after its last round."""
    clients = MadeClients(groups, seed)
    clients.hostile = attackers(len(clients.group), fraction, seed)
    if attack is not None:
        clients.send = COLLUSIONS[attack].send
        COLLUSIONS[attack].poison(clients)
    recipe = Recipe.load(
        "smoke", ["baselines=[]", f"strategy={strategy}", f"rounds={ROUNDS}", *defense]
    )
    federation = Federation(recipe, clients.engine())
    fltrust.Server.updates = lambda: clients.server_updates(federation.strategy.soup.rows)
    for _ in federation.rounds():
        pass
    rows = torch.stack([federation.strategy.adapter(i) for i in range(len(clients.group))])
    honest = torch.ones(len(rows), dtype=torch.bool)
    honest[clients.hostile] = False
    accuracies = 100 * clients.accuracies(rows)
    return Outcome(
        float(accuracies[honest].mean()),
        [float(accuracies[honest & (clients.group == g)].mean()) for g in range(len(groups))],
        100 * float(clients.trigger_rates(rows)[honest].mean()),
    )


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(first: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[*first, *DEFENSES], ["---"] * (len(first) + len(DEFENSES)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(seeds: Sequence[int]) -> str:
    """Run everything; return the page."""
    accuracy: dict[str, list[list[str]]] = {}
    triggers: list[list[str]] = []
    for title, strategy, groups in (SHARED, GROUPED):
        accuracy[title] = []
        cases = [(attack, fraction) for attack in COLLUSIONS for fraction in FRACTIONS]
        for attack, fraction in [(None, 0.0), *cases]:
            if attack == "takeover" and len(groups) == 1:
                continue
            found = [
                [outcome(strategy, groups, d, seed, attack, fraction) for seed in seeds]
                for d in DEFENSES.values()
            ]
            of = [f"{attack or 'none'}", f"{100 * fraction:.0f} %"]
            worst = [fmean(min(o.groups) for o in each) for each in found]
            accuracy[title].append(
                [
                    *of,
                    *(
                        spread([o.accuracy for o in each])
                        + (f" ({least:.1f})" if len(groups) > 1 else "")
                        for each, least in zip(found, worst, strict=True)
                    ),
                ]
            )
            if attack in (None, "backdoor"):
                rates = (spread([o.trigger for o in each]) for each in found)
                triggers.append([title, of[1], *rates])
            print(*accuracy[title][-1], sep=" | ", flush=True)
    small = []
    for fraction in FRACTIONS:
        count = round(fraction * CLIENTS)
        groups = (count, (CLIENTS - count + 1) // 2, (CLIENTS - count) // 2)
        found = [
            [outcome(GROUPED[1], groups, d, seed).groups[0] for seed in seeds]
            for d in DEFENSES.values()
        ]
        small.append([f"{100 * fraction:.0f} %", *map(spread, found)])
    over = "Accuracy of the honest clients in %, mean ± std over seeds"
    return (
        "# Colluding clients\n\n"
        f"{CLIENTS} clients with made data and a small model, {ROUNDS} rounds, seeds "
        f"{', '.join(map(str, seeds))}.\nAll defenses but none clip updates to the median norm "
        "(`norm_multiple: 1`).\n\n"
        f"## {SHARED[0]}\n\n{over}.\n\n"
        f"{table(['attack', 'colluders'], accuracy[SHARED[0]])}\n\n"
        f"## {GROUPED[0]}\n\n{over}; in brackets, the mean of the worst group.\n\n"
        f"{table(['attack', 'colluders'], accuracy[GROUPED[0]])}\n\n"
        "## Backdoor\n\nInputs with the trigger that get the target label, in %, of the honest "
        "clients' inputs\nwith other labels.\n\n"
        f"{table(['federation', 'colluders'], triggers)}\n\n"
        "## Small groups of honest clients\n\nAccuracy of the smallest group in %, with FedMerge "
        f"and no attack.\n\n{table(['clients of the group'], small)}\n\n"
        f"{stamp_process()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--write", action="store_true", help="write results/robustness_colluders.md"
    )
    arguments = parser.parse_args()
    text = page([int(seed) for seed in arguments.seeds.split(",")])
    print(f"\n{text}")
    if arguments.write:
        (RESULTS / "robustness_colluders.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

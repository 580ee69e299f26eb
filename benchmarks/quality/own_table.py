"""Run a newcomer's table: three hundred letters, six offices, and a recipe with columns alone.

    python benchmarks/quality/own_table.py --write

The offices pass letters to three desks. Three of them choose the desk by the topic of a letter,
the others by how soon the sender needs an answer, so that a desk means something else in each half.
The recipe contains no hint of this. All its other values are defaults of the package, and the
baselines that it names are those of every run. The letters and the run's seed are drawn anew for
each repeat.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pandas as pd
from provenance import RESULTS, stamp

from fedmerge_peft import Comparison, Recipe, sweep
from fedmerge_peft.analysis.reports import markdown

OFFICES = ("Ash", "Birch", "Cedar", "Elm", "Fir", "Hazel")
ROWS = 50  # letters of an office
DESKS = ("front", "middle", "back")
TOPICS = {
    "front": (
        "the parking permit for {street}",
        "a second key to the bicycle cellar",
        "where a moving van may stop in {street}",
        "the barrier of the car park, which stays down",
        "a space for a trailer near {street}",
        "the charging point for electric cars",
        "a scooter that has been left at the entrance",
        "resident parking for my mother's car",
    ),
    "middle": (
        "the water bill for {month}",
        "a refund for the heating of last winter",
        "the deposit that was never paid back",
        "an invoice that came twice in {month}",
        "the direct debit, which took the wrong amount",
        "paying the rent of {month} in two parts",
        "a reminder for a sum that I have paid",
        "the price of electricity in the stairwell",
    ),
    "back": (
        "the dripping tap in the kitchen",
        "a window in {street} that does not shut",
        "mould on the bedroom ceiling",
        "the lift, which stops between two floors",
        "a broken tile in the bathroom",
        "the radiator that stays cold",
        "a loose handrail on the stairs",
        "the door bell of {street}, which is silent",
    ),
}
TIMES = {
    "front": (
        "I need an answer today.",
        "Please ring me back within the hour.",
        "This cannot wait until tomorrow.",
        "It is urgent, somebody could be hurt.",
        "Please send someone at once.",
        "I am waiting at the telephone now.",
    ),
    "middle": (
        "An answer this week would be good.",
        "Could you write to me before Friday?",
        "I shall call again in a few days.",
        "Some day this week suits me.",
        "Please let me know by the weekend.",
        "I hope to hear from you in the coming days.",
    ),
    "back": (
        "There is no hurry at all.",
        "Take your time.",
        "Next month is early enough.",
        "Any time this year will do.",
        "I only wanted to mention it.",
        "Answer whenever it suits you.",
    ),
}
OPENINGS = (
    "Good morning, I am writing about {topic}.",
    "Dear office, it is about {topic}.",
    "My question concerns {topic}.",
    "Hello, could somebody look into {topic}?",
    "Once more about {topic}.",
)
STREETS = ("Mill Lane", "Station Road", "Church Street", "Garden Row", "Quay Street")
MONTHS = ("January", "March", "May", "August", "October")


def letters(seed: int) -> pd.DataFrame:
    """Return a table with columns office, letter and desk, ``ROWS`` rows per office."""
    draw = random.Random(seed)
    rows = []
    for index, office in enumerate(OFFICES):
        for _ in range(ROWS):
            by_topic, by_time = draw.choice(DESKS), draw.choice(DESKS)
            topic = draw.choice(TOPICS[by_topic])
            topic = topic.format(street=draw.choice(STREETS), month=draw.choice(MONTHS))
            opening = draw.choice(OPENINGS).format(topic=topic)
            text = f"{opening} {draw.choice(TIMES[by_time])}"
            rows.append((office, text, by_topic if index % 2 == 0 else by_time))
    return pd.DataFrame(rows, columns=["office", "letter", "desk"])


def recipe(table: Path, seed: int) -> Recipe:
    """Return the recipe: path, columns and the embedded backbone."""
    return Recipe(
        {
            "name": "own_table",
            "seed": seed,
            "task": {"name": "sequence-classification", "text": "letter", "label": "desk"},
            "backbone": {"model": "sentence-transformers/all-MiniLM-L6-v2"},
            "data": {"path": str(table), "partition": {"scheme": "natural", "by": "office"}},
            "baselines": ["fedavg", "local"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--out", default="sweeps/own_table", help="folder of the run directories")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/own_table.md"
    )
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    recipes = []
    for seed in map(int, arguments.seeds.split(",")):
        table = out / f"letters_{seed}.csv"
        letters(seed).to_csv(table, index=False)
        recipes.append(recipe(table, seed))
    runs = sweep(
        {f"seed_{each.seed}": each for each in recipes},
        out,
        on_round=lambda name, record: print(f"{name}  {record}", flush=True),
    )
    page = f"{markdown(Comparison.of(runs.values()))}\n{stamp(runs.values())}\n"
    print(f"\n{page}")
    if arguments.write:
        (RESULTS / "own_table.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

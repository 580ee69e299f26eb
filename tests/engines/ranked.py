"""A program that runs ``SCENARIOS`` into a folder, alone or on the ranks of a launcher.

ranked.py FOLDER scenario...
ranked.py FOLDER kill scenario      both ranks die after the second round
ranked.py FOLDER break scenario     the last rank alone fails, in a way nobody meant
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from fedmerge_peft import Callback, Recipe, distributed, federate
from fedmerge_peft.engines.distributed import load_engine

SMALL = [
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder, Birch]",
    "training.device=cpu",
    "baselines=[]",
    "rounds=3",
]
SCENARIOS = {
    "fedmerge": [
        "strategy={name: fedmerge, adapters: 3, start: warm, warm_rounds: 1}",
        "training.clients_per_batch=2",
        "baselines=[fedavg]",
    ],
    "flhc": ["strategy={name: flhc, adapters: 2, warm_rounds: 1}", "training.clients_per_batch=1"],
    "auto": [
        "strategy=fedavg",
        "training.learning_rate=auto",
        "training.epochs=auto",
        "training.clients_per_batch=2",
        "data.validation_fraction=0.25",
        "rounds=2",
    ],
    # three clients, in passes of two and one
    "ditto": [
        "strategy=ditto",
        "clients.fraction=0.5",
        "training.clients_per_batch=2",
    ],
    "flora": ["strategy={name: flora, ranks: [1, 2]}"],
    # one client, so that a rank has none
    "fedem": [
        "strategy={name: fedem, adapters: 2}",
        "clients.fraction=0.1",
    ],
    "failing": [
        "strategy={name: ifca, adapters: 2}",
        "clients.failures=skip",
        "training.clients_per_batch=1",
    ],
}


def one_client_fails(engine):
    """Let the training of the last client fail."""
    culprit, collate = engine.clients[-1], engine.task.collate

    def fail(examples, indices):
        if np.isin(indices, culprit.train).any():
            raise ZeroDivisionError("no luck")
        return collate(examples, indices)

    engine.task.collate = fail


def die(record):
    if record.round == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def run(folder, name, on_round=None, broken=False):
    recipe = Recipe.load("smoke", [*SMALL, *SCENARIOS[name]])
    engine = load_engine(recipe)
    if name == "failing":
        one_client_fails(engine)
    if broken and distributed.rank() == distributed.world_size() - 1:
        engine._own_replies = lambda *_: 1 / 0
    return federate(
        recipe,
        folder / name,
        engine=engine,
        callbacks=[Callback(on_round=on_round)] if on_round else [],
    )


def main(folder, *names):
    on_round = die if names[0] == "kill" else None
    broken = names[0] == "break"
    for name in names[1:] if on_round or broken else names:
        assert run(Path(folder), name, on_round, broken).ended
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

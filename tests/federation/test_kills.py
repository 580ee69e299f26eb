"""Runs that are killed at random moments end with the bits of an uninterrupted run."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

STRATEGIES = {
    "fedmerge": [
        "strategy={name: fedmerge, adapters: 3, start: warm, warm_rounds: 2, server_momentum: 0.5}",
        "baselines=[fedavg]",
    ],
    "ditto": ["strategy={name: ditto, server_optimizer: adam}", "baselines=[]"],
    "fesem": ["strategy={name: fesem, adapters: 2}", "baselines=[]"],
}
KILLS = 5
"""Of each strategy's runs, with clients one at a time and in one pass of the model."""


@pytest.fixture(scope="module")
def killable():
    """``killable(path, strategy, together, kill)``: return (killed, number of events)."""
    program = [sys.executable, str(Path(__file__).with_name("killable.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def ask(path, strategy, together, kill=None):
        overrides = [
            *STRATEGIES[strategy],
            "rounds=4",
            "clients.fraction=0.5",
            f"training.clients_per_batch={together}",
        ]
        process.stdin.write(
            json.dumps({"path": str(path), "strategy": overrides, "kill": kill}) + "\n"
        )
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_ends_like_an_uninterrupted_one(
    killable, tmp_path, left_behind, strategy, together
):
    assert killable(tmp_path / "whole", strategy, together)[0] is False
    begin = perf_counter()
    _, events = killable(tmp_path / "counted", strategy, together)
    seconds = perf_counter() - begin
    whole = left_behind(tmp_path / "whole")
    assert left_behind(tmp_path / "counted") == whole
    chance = random.Random(f"{strategy} {together}")
    kinds = {
        "event": lambda: chance.randint(1, events),
        "torn": lambda: chance.randint(1, 16),  # four files of tensors a round
        "after": lambda: chance.uniform(0, seconds),
    }
    kills = trial = 0
    while kills < KILLS:
        path = tmp_path / str(trial)
        trial += 1
        history = []
        for _ in range(chance.choice([1, 1, 2, 3])):  # also while it resumes
            kind = chance.choice(list(kinds))
            history.append([kind, kinds[kind]()])
            kills += killable(path, strategy, together, history[-1])[0]
        assert killable(path, strategy, together)[0] is False
        assert left_behind(path) == whole, history

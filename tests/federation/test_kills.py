"""Runs that are killed, or whose disk is full, end with the bits of an uninterrupted run."""

import json
import os
import random
import re
import shutil
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
    "private head": ["strategy={name: fedmerge, adapters: 2, head: private}", "baselines=[]"],
    "blocks": ["strategy={name: fedmerge, adapters: 2, blocks: layers}", "baselines=[]"],
    "central": [
        "strategy={name: fedmerge, adapters: 2, start: independent}",
        "privacy={mode: central}",
        "baselines=[fedavg]",
    ],
    "local": ["strategy=fedavg", "privacy={mode: local}", "baselines=[]"],
}
KILLS = 3
"""Of each strategy's runs, with clients one at a time and in one pass of the model."""
SIZES = 2
"""Of the disks that each strategy's runs fill."""
PAGE = 4096
"""Bytes that a disk in memory has at least for each file."""


@pytest.fixture(scope="module")
def killable():
    """``killable(path, strategy, together, kill)``: return (killed, number of events, error)."""
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
    assert process.wait(120) == 0


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_ends_like_an_uninterrupted_one(
    killable, tmp_path, left_behind, strategy, together
):
    assert killable(tmp_path / "whole", strategy, together)[0] is False
    begin = perf_counter()
    _, events, _ = killable(tmp_path / "counted", strategy, together)
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


@pytest.fixture
def disk(tmp_path):
    """``disk(bytes)``: a folder on a disk of this size; called again, the disk changes its size.

    Skips if the system does not allow it.
    """
    folder = tmp_path / "disk"

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "fedmerge-test", str(folder)]
        try:
            subprocess.run(command, capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this system does not allow disks in memory: {error}")

    def make(size):
        if not folder.exists():
            folder.mkdir()
            mount(f"size={size}")
        else:
            mount("remount", f"size={size}")
        return folder

    yield make
    if folder.exists():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_full_disk_is_one_error_and_a_resumed_run_ends_like_an_uninterrupted_one(
    killable, tmp_path, disk, left_behind, strategy
):
    assert killable(tmp_path / "whole", strategy, 2)[0] is False
    whole = left_behind(tmp_path / "whole")
    pages = sum(-(-file.stat().st_size // PAGE) + 1 for file in (tmp_path / "whole").rglob("*"))
    chance = random.Random(strategy)
    full = trial = 0
    while full < SIZES:
        sizes = sorted(chance.randint(2, pages) for _ in range(2))
        path = disk(sizes[0] * PAGE) / str(trial)
        trial += 1
        for size in sizes:  # also while it resumes
            disk(size * PAGE)
            killed, _, error = killable(path, strategy, 2)
            assert killed is False
            if error is not None:
                full += 1
                assert re.search(r"cannot be written \(.*No space left on device", error), error
        disk(64 * pages * PAGE)
        assert killable(path, strategy, 2)[2] is None
        assert left_behind(path) == whole, sizes
        shutil.rmtree(path)

"""A round's replies as one matrix, with a small part in memory at a time."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from equality import assert_near
from fedmerge_peft.util import row_buffer

pytestmark = pytest.mark.equality

SIZES = [10, 30, 20, 5, 15, 25, 10]
SETTINGS = [
    ("fedavg", {}),
    ("ifca", {"adapters": 3}),
    *[
        ("fedmerge", {"adapters": 3, "start": "independent", "rule": rule})
        for rule in ("normalized", "paper", "gradient", "adam")
    ],
    ("fedmerge", {"adapters": 3, "start": "warm", "warm_rounds": 2}),
    ("fedmerge", {"adapters": 3, "start": "independent", "reseed_after": 1}),
    ("flhc", {"adapters": 2, "warm_rounds": 2}),
    ("ditto", {}),
]


def after_four_rounds(formulas, name, settings):
    federation = formulas(len(SIZES), sizes=SIZES)
    strategy = federation.strategy(name, **settings)
    for cohort in (range(7), [0, 1, 2, 3, 5], range(7), [1, 2, 4, 6]):
        federation.round(strategy, cohort)
    return strategy


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_on_blocks_of_columns_equals_the_step_on_all_columns(
    monkeypatch, formulas, name, settings, rows
):
    whole = after_four_rounds(formulas, name, settings)
    monkeypatch.setattr(row_buffer, "BLOCK_BYTES", 4 * rows * whole.soup.layout.size)
    parts = after_four_rounds(formulas, name, settings)
    assert_near(parts.soup.rows, whole.soup.rows)
    assert_near(parts.weights, whole.weights)


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_the_order_of_replies_changes_no_bit(monkeypatch, formulas, name, settings):
    federation = formulas(len(SIZES), sizes=SIZES)
    monkeypatch.setattr(row_buffer, "BLOCK_BYTES", 12 * federation.layout.size)
    one, other = (federation.strategy(name, **settings) for _ in range(2))
    for _ in range(3):
        replies = list(federation.replies(one))
        one.update(replies)
        other.update([replace(reply, deltas=reply.deltas.clone()) for reply in reversed(replies)])
    assert torch.equal(one.soup.rows, other.soup.rows)
    assert torch.equal(one.weights, other.weights)


def test_warm_means_need_one_row_for_each_client_that_has_replied(formulas):
    federation = formulas(50)
    strategy = federation.strategy("fedmerge", adapters=2, start="warm", warm_rounds=5)
    federation.round(strategy, [3, 40])
    federation.round(strategy, [7, 40])
    assert strategy.state_dict()["warming.sums"].shape == (3, federation.layout.size)


_TIGHT = """
import resource
import torch
from fedmerge_peft import AdapterLayout
from fedmerge_peft.util import row_buffer
from fedmerge_peft.recipe.strategies import FedMergeRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy

row_buffer.BLOCK_BYTES = row_buffer.MEMORY_BYTES = 2**22
SIZE, CLIENTS = 2**18, 200
layout = AdapterLayout.from_tensors([("head.weight", (SIZE,), "head")])
def fresh_row(number):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(number))


start = StrategyContext(CLIENTS, layout, fresh_row)


def learn(count):
    kept = row_buffer.RowBuffer(expected_calls=count)
    rows = (kept.append(torch.randn(1, SIZE)) for _ in range(count))
    replies = [Reply(client, row, 10, 1.0, 0.0) for client, row in enumerate(rows)]
    for more in ({}, {"start": "warm"}):
        recipe = FedMergeRecipe(name="fedmerge", adapters=2, warm_rounds=1, **more)
        make_strategy(recipe, start).update(replies)
    return replies


learn(8)  # memory that the libraries need in any case
lines = open("/proc/self/status").read().splitlines()
now = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * now + 64 * 2**20,) * 2)
replies = learn(CLIENTS)
try:
    torch.stack([reply.delta for reply in replies])
except RuntimeError:
    print("too much")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the limit on a process's own memory is Linux's"
)
def test_two_hundred_replies_of_a_megabyte_need_a_third_of_their_memory():
    # what is freed goes back to the system
    exact = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", _TIGHT],
        env=exact,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "too much\n"

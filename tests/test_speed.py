"""The speed benchmark compares like with like, and its page keeps what it is not asked to renew."""

import importlib
from pathlib import Path

import pytest
import torch

from fedmerge_peft import AdapterLayout
from fedmerge_peft.recipe.strategies import FedMerge
from fedmerge_peft.strategies import Reply, Start, make_strategy

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module


def test_the_loop_over_tensors_does_what_the_server_step_does(benchmark):
    layout = AdapterLayout.of([("one.lora_A.weight", (2, 3), "lora"), ("head.weight", (4,), "head")])
    rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    deltas = 0.1 * torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    strategy = make_strategy(FedMerge(name="fedmerge", adapters=3), Start(5, layout, rows.__getitem__))
    soup, uniform = [layout.state_dict(row) for row in rows], torch.full((5, 3), 1 / 3)
    found = benchmark("server").by_tensor(soup, uniform, [layout.state_dict(delta) for delta in deltas])
    strategy.update([Reply(client, deltas[client][None], 10, 1.0, 0.0) for client in range(5)])
    for state, row in zip(found, strategy.soup.rows, strict=True):
        torch.testing.assert_close(state, layout.state_dict(row))


def test_a_ratio_says_how_many_times_as_long_the_other_way_takes(benchmark):
    timing = benchmark("timing")
    row = timing.faster("what", {"ours": [1.0, 2.0, 1.0], "theirs": [2.0, 3.0, 4.0]}, "ours", "theirs", "≥ 2")
    assert (row.ratio, row.low, row.high) == (2.0, 1.5, 4.0)
    assert str(row) == "| what | 2.00 | 1.50 to 4.00 | ours 1.00 s, theirs 3.00 s | ≥ 2 |"


def test_sides_take_turns_and_the_order_turns_round(benchmark):
    order = []
    taken = benchmark("timing").race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in taken.values()] == [3, 3]


def test_the_page_is_read_back_row_by_row(benchmark):
    page = "# Speed\n\nA ratio.\n\n## server\n\nd. Steps.\n\n| a |\n\n## startup\n\nf. Start.\n"
    assert benchmark("pages").sections(page) == {"server": "d. Steps.\n\n| a |\n\n", "startup": "f. Start.\n"}

"""The speed benchmark compares like with like and keeps the rows that it does not measure."""

import importlib
from pathlib import Path

import pytest
import torch

from fedmerge_peft import AdapterLayout
from fedmerge_peft.recipe.strategies import FedMergeRecipe
from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module


def test_the_loop_over_tensors_equals_the_server_step(benchmark):
    layout = AdapterLayout.from_tensors(
        [("one.lora_A.weight", (2, 3), "lora"), ("head.weight", (4,), "head")]
    )
    rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    deltas = 0.1 * torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, start="independent", weights_lr=1.0),
        StrategyContext(5, layout, rows.__getitem__),
    )
    soup, uniform = [layout.state_dict(row) for row in rows], torch.full((5, 3), 1 / 3)
    found = benchmark("server").by_tensor(
        soup, uniform, [layout.state_dict(delta) for delta in deltas]
    )
    strategy.update([Reply(client, deltas[client][None], 10, 1.0, 0.0) for client in range(5)])
    for state, row in zip(found, strategy.soup.rows, strict=True):
        torch.testing.assert_close(state, layout.state_dict(row))


def test_a_ratio_is_the_time_of_the_alternative_over_ours(benchmark):
    timing = benchmark("timing")
    row = timing.faster(
        "what", {"ours": [1.0, 2.0, 1.0], "theirs": [2.0, 3.0, 4.0]}, "ours", "theirs", "≥ 2"
    )
    assert (row.ratio, row.low, row.high) == (2.0, 1.5, 4.0)
    assert str(row) == "| what | 2.00 | 1.50 to 4.00 | ours 1.00 s, theirs 3.00 s | ≥ 2 |"


def test_sides_alternate_in_alternating_order(benchmark):
    order = []
    taken = benchmark("timing").race(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in taken.values()] == [3, 3]


def test_the_page_is_read_back_row_by_row(benchmark):
    page = "# Speed\n\nA ratio.\n\n## server\n\nd. Steps.\n\n| a |\n\n## startup\n\nf. Start.\n"
    assert benchmark("pages").sections(page) == {
        "server": "d. Steps.\n\n| a |\n\n",
        "startup": "f. Start.\n",
    }


def test_neighboring_sizes_are_compared_and_sizes_beyond_memory_left_out(benchmark, monkeypatch):
    scale = benchmark("scale")
    monkeypatch.setattr(scale, "SIZES", ((8, 10**5), (8, 10**6), (8, 10**9)))
    monkeypatch.setattr(scale, "ADAPTERS", (1, 2))
    monkeypatch.setattr(
        scale,
        "_measured",
        lambda adapters, size, repeats: ([size / 1e4] * repeats, [adapters * size / 1e6] * repeats),
    )
    rows = {row.what: (row.ratio, row.sides) for row in scale.sizes()}
    assert rows == {
        "e. 2 adapters of 10^6 over 1 adapter of 10^6": (
            2.0,
            "2.00 s and 100 MB, 1 adapter of 10^6 1.00 s",
        ),
        "e. 8 adapters of 10^6 over 8 adapters of 10^5": (
            10.0,
            "8.00 s and 100 MB, 8 adapters of 10^5 800 ms",
        ),
    }


def test_a_servers_round_is_measured_in_megabytes_and_seconds(benchmark):
    memory, taken = benchmark("scale")._serve(2, 1000)
    assert memory > 10
    assert 0 < taken < 10


def test_each_storage_of_a_soup_is_measured(benchmark, tmp_path):
    soup = benchmark("soup")
    for section in soup.SOUPS:
        memory, *times = soup.serve(section, 2, 1000, tmp_path)
        assert memory > 10
        assert all(0 < taken < 10 for taken in times)


def test_the_plain_program_trains_the_examples_of_an_engine(benchmark):
    setting = benchmark("setting")
    engine = setting.engine(1, 8, model="tiny:bert")
    plain = setting.Plain(engine)
    before = [parameter.detach().clone() for parameter in plain.parameters]
    assert plain.train([int(row) for row in engine.clients[0].train]) > 0
    assert any(not torch.equal(*pair) for pair in zip(plain.parameters, before, strict=True))

"""The programs of other frameworks compute the round that this package computes."""

import importlib
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"
CLIENTS, BATCH = 3, 4

needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="Unix sockets")


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module


@pytest.fixture
def folder(benchmark):
    """A tiny decoder, with one step of SGD on all examples of each client."""
    with benchmark("workload").made("tiny", CLIENTS, 1, BATCH, "sgd") as made:
        yield made


@pytest.fixture
def expected(benchmark, folder):
    """The adapter after a round of this package, by PEFT's names."""
    federation = benchmark("setting").rounds(benchmark("workload").engine(folder))
    next(federation.rounds())
    soup = federation.strategy.soup
    return soup.layout.state_dict(soup.rows[0])


def assert_same_round(folder, found, expected):
    start = load_file(folder / "start.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), tensor, rtol=1e-4, atol=1e-7)
    moved = [float((tensor - start[name]).abs().max()) for name, tensor in expected.items()]
    assert max(moved) > 1e-5


@pytest.mark.slow
@pytest.mark.equality
def test_the_loop_of_openfedllm_computes_our_round(benchmark, folder, expected):
    programs = benchmark("programs")
    setting = programs.load(folder)
    found = benchmark("openfedllm").run_round(programs.new_model(setting), setting, setting.start)
    assert_same_round(folder, found, expected)


@pytest.mark.equality
def test_the_plain_loop_computes_our_round(benchmark, folder, expected):
    programs = benchmark("programs")
    setting = programs.load(folder)
    found = benchmark("openfedllm").run_round(
        programs.new_model(setting), setting, setting.start, programs.train_in_loop
    )
    assert_same_round(folder, found, expected)


@needs_unix
@pytest.mark.slow
@pytest.mark.equality
@pytest.mark.parametrize(
    ("name", "script", "package"),
    [
        ("ours", ("ours.py",), "torch"),
        ("plain", ("plain.py",), "torch"),
        ("flower-kept", ("flower.py", "kept"), "flwr"),
        ("flower-written", ("flower.py", "written"), "flwr"),
        ("flare", ("flare.py",), "nvflare"),
        ("pfl", ("pfl_research.py",), "pfl"),
    ],
)
def test_programs_compute_our_round(benchmark, folder, expected, name, script, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = benchmark("rivals").Program(folder, 1, *script)
    program.end()
    assert 0 < program.startup < 600
    assert_same_round(folder, load_file(folder / f"end-{name}.safetensors"), expected)


@needs_unix
def test_a_program_runs_a_round_only_in_its_turn(benchmark, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from rivals import Turns\n"
        "folder, rounds, address = sys.argv[1:]\n"
        "turns = Turns(address)\n"
        "turns.boundary()\n"
        "for number in range(int(rounds)):\n"
        "    Path(folder, 'rounds').open('a').write(f'{number} ')\n"
        "    turns.boundary()\n"
        "Path(folder, 'rounds').open('a').write('end')\n"
    )
    program = benchmark("rivals").Program(tmp_path, 2, str(script))
    done = tmp_path / "rounds"
    assert done.read_text() == "0 "
    assert program.processor_time() > 0
    program.round()
    assert done.read_text() == "0 1 "
    program.end()
    assert done.read_text() == "0 1 end"


@needs_unix
def test_a_program_that_ends_early_is_an_error_with_its_last_output(benchmark, tmp_path):
    script = tmp_path / "program.py"
    script.write_text("raise SystemExit('no such model')\n")
    with pytest.raises(RuntimeError, match="no such model"):
        benchmark("rivals").Program(tmp_path, 2, str(script))


def test_rows_compare_rounds_and_the_time_to_the_end_of_the_first(benchmark, monkeypatch):
    rivals = benchmark("rivals")

    class Fake:
        def __init__(self, folder, rounds, script):
            self.script, self.startup = script, {"ours.py": 2.0, "theirs.py": 5.0}[script]

        def round(self):
            clock[0] += {"ours.py": 1.0, "theirs.py": 3.0}[self.script]

        def processor_time(self):
            return clock[0] / 2

        def end(self):
            pass

    clock = [0.0]
    monkeypatch.setattr(rivals, "Program", Fake)
    monkeypatch.setattr(
        rivals,
        "race",
        lambda sides, repeats, warm: benchmark("timing").race(
            sides, repeats, warm, clock=lambda: clock[0]
        ),
    )
    rows = list(
        rivals.compared(Path(), "decoder", {"theirs": ("theirs.py",)}, {"theirs": "≥ 2"}, repeats=2)
    )
    assert [str(row) for row in rows] == [
        "| theirs; decoder | 3.00 | 3.00 to 3.00 | ours 1.00 s, theirs 3.00 s | ≥ 2 |",
        "| theirs; decoder, processor time | 3.00 | 3.00 to 3.00 | ours 500 ms, theirs 1.50 s |  |",
        "| theirs; decoder, start to end of round 1 | 2.50 | 2.50 to 2.50 "
        "| ours 2.00 s, theirs 5.00 s |  |",
    ]

"""Several ranks give the bits of one; if one fails, all end."""

import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmerge_peft import (
    ClientError,
    DeviceError,
    RankError,
    RecipeError,
    Run,
    RunExistsError,
    federate,
    resume,
    sweep,
)
from fedmerge_peft.cli import main
from fedmerge_peft.cli.stopping import Stopped
from fedmerge_peft.engines.assignments import Assignments
from fedmerge_peft.engines.distributed import RankedEngine, balanced
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.accelerator import choose_device

PROGRAM = Path(__file__).with_name("ranked.py")
RANKED = runpy.run_path(str(PROGRAM))
SCENARIOS = RANKED["SCENARIOS"]


# ---- in one process ------------------------------------------------------------------------------


def test_the_most_expensive_client_goes_to_the_least_loaded_rank():
    assert balanced([1, 5, 3, 3, 2], 2) == [1, 0, 1, 1, 0]
    assert balanced([1, 1, 1], 2) == [0, 1, 0]
    assert balanced([4], 3) == [0]
    assert balanced([], 2) == []


def test_assignments_are_created_lazily():
    made = []

    def make(client):
        made.append(client)
        return "plan"

    assignments = Assignments([4, 7], make)
    assert next(iter(assignments)) == (4, "plan")
    assert made == [4]
    assert Assignments.of(assignments) is assignments
    held = Assignments.of((client, "other") for client in (3, 1))
    assert (held.clients, held.make(1)) == ([3, 1], "other")


@pytest.mark.parametrize(
    "error",
    [
        ClientError("Ann", 3, "lost"),
        RecipeError("one", "two"),
        RunExistsError("there", Path("free")),
        RankError("gone"),
        Stopped(15),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_reaches_another_process_unchanged(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("cuda:1", "cuda:1 does not suit 2 ranks"), ("mps", "mps does not suit 2 ranks")],
)
def test_each_rank_uses_a_device_of_its_own(monkeypatch, wanted, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match=message):
        choose_device(wanted)


def test_ranks_use_their_own_gpus_and_fail_if_there_are_too_few(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(choose_device("auto")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        DeviceError, match=r"rank 2 has no separate GPU: PyTorch finds 2 GPUs"
    ) as caught:
        choose_device("auto")
    assert caught.value.rank == 2  # nobody else may know


def test_ranks_wait_for_the_rank_that_prints(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    # a launcher ends all ranks as soon as one has ended
    for rank, count, waits in (
        ("1", 0, [5.0]),
        ("0", 1, [5.0]),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            main(["run", "smoke", "training.learnin_rate=1"])
        assert (capsys.readouterr().err.count("unknown key"), waited) == (count, waits)


def test_a_sweep_on_several_ranks_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="a sweep does not run on several ranks"):
        sweep({}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("together", [1, 4])
def test_a_single_rank_equals_the_local_engine(smoke, tmp_path, left_behind, together):
    recipe = smoke(
        "strategy=ifca", "clients.failures=skip", f"training.clients_per_batch={together}"
    )
    local = LocalEngine.from_recipe(recipe)
    RANKED["one_client_fails"](local)
    ranked = RankedEngine(recipe, local.clients, local.runtime)
    runs = [
        federate(recipe, tmp_path / type(engine).__name__, engine=engine)
        for engine in (local, ranked)
    ]
    assert left_behind(runs[0].path) == left_behind(runs[1].path)
    assert all(record["failures"] for record in runs[1].records)


@pytest.mark.parametrize(
    ("training", "passes"), [("training.epochs=2", 2), ("training.steps=3", 3 * 4 / 6)]
)
def test_a_clients_cost_is_its_tokens_times_its_passes(smoke, training, passes):
    engine = RankedEngine.from_recipe(smoke(training, "training.batch_size=4"))
    held = engine.clients[0]
    assert held.size == 6
    train, scored = (
        int(engine.runtime.examples.lengths[rows].sum())
        for rows in (held.train, [*held.validation, *held.test])
    )
    assert engine._work(0) == 3 * passes * train + scored


# ---- in two --------------------------------------------------------------------------------------


def command(*program):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *map(str, program),
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def launched(*program):
    return subprocess.run(
        command(*program), capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    """The folder of the scenarios' runs in one process."""
    folder = tmp_path_factory.mktemp("one")
    program = [sys.executable, PROGRAM, folder, *SCENARIOS]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = launched(PROGRAM, folder, *SCENARIOS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_write_the_same_run_as_one(on_one_rank, on_two_ranks, left_behind, scenario):
    one, two = Run(on_one_rank / scenario), Run(on_two_ranks / scenario)
    assert left_behind(two.path) == left_behind(one.path)
    assert (one.environment["ranks"], two.environment["ranks"]) == (1, 2)
    assert all(bool(record["failures"]) == (scenario == "failing") for record in two.records)


@pytest.mark.slow
def test_after_a_kill_of_both_ranks_the_run_resumes_to_the_same_bits(
    on_one_rank, tmp_path, left_behind
):
    killed = launched(PROGRAM, tmp_path, "kill", "fedmerge")
    run = Run(tmp_path / "fedmerge")
    assert killed.returncode != 0
    assert (len(run.records), run.ended) == (2, False)
    done = launched("-m", "fedmerge_peft", "resume", run.path, "-q")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round 3/3") == 2  # fedmerge's and fedavg's, by the first rank alone
    assert left_behind(run.path) == left_behind(on_one_rank / "fedmerge")


@pytest.mark.slow
def test_an_unexpected_failure_ends_all_ranks_and_names_the_rank(tmp_path):
    begin = time.perf_counter()
    done = launched(PROGRAM, tmp_path, "break", "flhc")
    assert done.returncode != 0
    assert "[rank1]: ZeroDivisionError: division by zero" in done.stderr
    assert time.perf_counter() - begin < 120
    assert not Run(tmp_path / "flhc").records


@pytest.mark.slow
def test_a_signal_ends_all_ranks_after_the_round_and_prints_the_command_once(tmp_path):
    recipe = [
        "smoke",
        "data.filter.provider=[Alder, Birch]",
        "training.device=cpu",
        "baselines=[]",
        "rounds=100000",
    ]
    program = command("-m", "fedmerge_peft", "run", *recipe, "--out", tmp_path / "run", "-q")
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    while not re.search(r"round +2/", line := process.stdout.readline()):
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("stopped; resume with: fedmerge resume") == 1
    assert output.count("stopping after this round") == 1
    assert not re.search("RankError|lost the connection", output)
    done = len(Run(tmp_path / "run").records)
    assert len(resume(tmp_path / "run", [f"rounds={done + 1}"]).records) == done + 1


@pytest.mark.slow
def test_recipe_errors_are_printed_once(tmp_path):
    done = launched(
        "-m", "fedmerge_peft", "run", "smoke", "training.learnin_rate=1", "--out", tmp_path / "run"
    )
    assert done.returncode != 0
    assert done.stderr.count("unknown key") == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = launched(
        "-m", "fedmerge_peft", "run", "smoke", "training.device=cpu", "--out", tmp_path / "full"
    )
    assert done.returncode != 0
    assert done.stderr.count("already holds other files") == 1
    done = launched(
        "-m",
        "fedmerge_peft",
        "run",
        "smoke",
        "training.device=cpu",
        "task.label=quue",
        "--out",
        tmp_path / "run",
    )
    assert done.returncode != 0
    assert done.stderr.count("'quue'") == 1  # found by both, when they load the data

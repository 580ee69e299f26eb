"""``--workers``: several ranks that one command starts, and their exit codes."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from fedmerge_peft import Recipe, Run
from fedmerge_peft.cli import main, workers
from fedmerge_peft.errors import DeviceError
from fedmerge_peft.runs.formats import FORMAT
from fedmerge_peft.util import checked

TINY = [
    "smoke",
    "rounds=2",
    "data.max_train=4",
    "data.max_test=2",
    "data.partition={scheme: iid, clients: 3}",
    "training.device=cpu",
    "baselines=[]",
]


@pytest.fixture
def no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_a_number_of_workers_is_taken(no_launcher):
    assert [workers.number_of_workers(number, "auto") for number in ("1", "3")] == [1, 3]


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (16, 4)])
def test_automatic_workers_follow_the_cores(no_launcher, monkeypatch, cores, expected):
    monkeypatch.setattr(workers, "_cores", lambda: cores)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert workers.number_of_workers("auto", "auto") == expected


@pytest.mark.parametrize(
    ("device", "expected"), [("auto", 8), ("cuda", 8), ("cpu", 2), ("cuda:1", 1), ("mps", 1)]
)
def test_automatic_workers_follow_the_recipes_device(no_launcher, monkeypatch, device, expected):
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert workers.number_of_workers("auto", device) == expected


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", ""])
def test_what_is_no_number_of_workers_is_refused(no_launcher, number):
    with pytest.raises(DeviceError, match="give a whole number of at least 1, or auto"):
        workers.number_of_workers(number, "auto")


def test_ranks_of_another_launcher_start_no_further_ones(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [workers.number_of_workers(number, "auto") for number in ("1", "auto")] == [1, 1]
    with pytest.raises(DeviceError, match="already started 2 processes"):
        workers.number_of_workers("4", "auto")


@pytest.mark.parametrize("command", ["run", "resume"])
def test_bad_numbers_are_one_message(command, no_launcher, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"  # of a run without rounds, for resume
    checked.write_text(recipe, Recipe.load("smoke").to_yaml())
    checked.write_document(tmp_path / "environment.json", {"format": FORMAT})
    monkeypatch.chdir(tmp_path)
    given = {"run": str(recipe), "resume": str(tmp_path)}[command]
    with pytest.raises(SystemExit) as stopped:
        main([command, given, "--workers", "none"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("--workers none: give a whole number")


def start(*arguments):
    environment = {key: os.environ[key] for key in os.environ if key != "WORLD_SIZE"}
    return subprocess.Popen(
        [sys.executable, "-m", "fedmerge_peft", *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.equality
def test_two_workers_give_the_bits_of_one(tmp_path):
    for count in ("1", "2"):
        process = start("run", *TINY, "--out", str(tmp_path / count), "--workers", count)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = (Run.open(tmp_path / count) for count in ("1", "2"))
    assert one.soup.rows.equal(two.soup.rows)
    assert one.clients.equals(two.clients)


@pytest.mark.slow
def test_an_error_of_the_ranks_is_one_message(tmp_path):
    process = start("run", *TINY, "task.label=none", "--out", str(tmp_path / "run"), "--workers=2")
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"task\.label: there is no column 'none'.*\n", errors)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_ranks_finish_their_round(tmp_path, number):
    path = tmp_path / "run"
    process = start("run", *TINY, "rounds=1000", "--out", str(path), "--quiet", "--workers", "2")
    assert process.stderr is not None
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"round +2/", line):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert f"resume with: fedmerge resume {path}" in errors
    done = Run.open(path).records[-1]["round"]
    assert 2 <= done < 1000
    process = start("resume", str(path), f"rounds={done + 1}", "--workers", "2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert Run.open(path).ended


@pytest.mark.slow
def test_a_killed_process_is_one_message(tmp_path):
    path = tmp_path / "run"
    process = start("run", *TINY, "rounds=1000", "--out", str(path), "--quiet", "--workers", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"round +2/", line):
            ranks = psutil.Process(process.pid).children()
            min(ranks, key=lambda rank: rank.create_time()).kill()  # rank 0 starts first
            break
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert re.search(r"rank 0 of 2 was killed \(SIGKILL\)|rank 1 lost the connection", errors)
    assert len(Run.open(path).records) >= 2

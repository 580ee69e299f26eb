"""``fedmerge sweep --jobs N``: several runs at a time, each reported once."""

import os
import re
import signal
import threading
import time

import pytest

from cli import made_jobs
from fedmerge_peft.cli import main, sweep_jobs
from fedmerge_peft.cli.stopping import Stopped
from fedmerge_peft.errors import RankError, RunError, SweepError

TINY = [
    "rounds=1",
    "data.max_train=6",
    "data.max_test=4",
    "training.device=cpu",
    "data.partition={scheme: iid, clients: 3}",
]


class Lines:
    def __init__(self):
        self.lines = []

    def round(self, name, completed, total, record):
        self.lines.append((name, completed, total))

    def ended(self, name, result):
        self.lines.append((name, result))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``run(job)``: run a sweep of "a" and "b" in two processes; return what was shown."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(job):
        monkeypatch.setattr(sweep_jobs, "_job", job)
        show = Lines()
        try:
            sweep_jobs.run_jobs(2, "smoke", [], ["a", "b"], tmp_path, show)
        except BaseException as error:
            return show.lines, error
        return show.lines, None

    return start


def test_each_run_is_reported_once_and_failures_come_last(run):
    lines, error = run(made_jobs.all_events)
    assert sorted(map(str, lines)) == sorted(
        map(str, [("a", 1, 2), ("b", "failed: b is wrong"), ("a", "fresh")])
    )
    assert isinstance(error, SweepError)
    assert list(error.failures) == ["b"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_runs_that_a_killed_process_left_are_an_error(run):
    lines, error = run(made_jobs.killed)
    assert lines == [("a", "fresh")]
    assert isinstance(error, RankError)
    assert "1 of 2 runs did not finish, because a process was killed (code -9)" in str(error)


def test_runs_that_are_left_without_an_error_are_an_error_without_a_code(run):
    lines, error = run(made_jobs.silent)
    assert lines == [("a", "fresh")]
    assert isinstance(error, RankError)
    assert str(error) == (
        "1 of 2 runs did not finish, although all processes ended without an error; repeat the "
        "command to continue"
    )


def test_a_sweep_that_is_refused_is_refused_once(run):
    lines, error = run(made_jobs.refused)
    assert lines == []
    assert isinstance(error, RunError)
    assert str(error) == "taken cannot be written"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_stops_all_processes(run):
    before = signal.getsignal(signal.SIGTERM)
    begin = time.monotonic()

    def stop():
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    _, error = run(made_jobs.until_stopped)
    assert isinstance(error, Stopped)
    assert error.code == 143
    assert time.monotonic() - begin < 50
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_reports_rounds_ends_and_failures(tmp_path):
    events = []
    values = ["task.label=nosuch,queue", "baselines=[]", *TINY]
    sweep_jobs.run_and_report("smoke", values, tmp_path, events.append)
    assert [event[:2] for event in events] == [
        ("failed", "task.label=nosuch"),
        ("round", "task.label=queue"),
        ("ended", "task.label=queue"),
    ]
    assert events[1][2:4] == (1, 1)
    assert events[2][2].startswith("served ")
    assert events[2][3] is True
    (tmp_path / "file").touch()
    sweep_jobs.run_and_report("smoke", TINY, tmp_path / "file", events.append)
    assert events[-1][:2] == ("fault", "")


@pytest.mark.equality
@pytest.mark.slow
def test_two_jobs_have_the_results_of_one(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def fedmerge(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(("sweep", "smoke", "strategy=fedavg,local", "baselines=[]", *TINY, *arguments))
        assert not stopped.value.code
        return capsys.readouterr().out

    out = fedmerge("--jobs", "2", "--out", "two")
    ended = re.findall(r"^\[(\d)/2\] strategy=(\w+)  served .* \d+\.\d s$", out, re.MULTILINE)
    assert {number for number, _ in ended} == {"1", "2"}
    assert {name for _, name in ended} == {"fedavg", "local"}
    assert "finished before" not in out
    fedmerge("--out", "one")
    for name in ("fedavg", "local"):
        soups = [
            next((tmp_path / each / f"strategy={name}").rglob("soup*.safetensors")).read_bytes()
            for each in ("one", "two")
        ]
        assert soups[0] == soups[1]

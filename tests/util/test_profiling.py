"""The time that the parts of a run take."""

import time

import pytest

from fedmerge_peft import federate
from fedmerge_peft.cli import main
from fedmerge_peft.util.profiling import collect_timings, timed


def test_each_moment_counts_once_for_the_innermost_part(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    with collect_timings() as timer, timed("other"), timed("train"), timed("save"):
        pass
    assert timer.seconds == {
        "train": 2.0,
        "evaluate": 0.0,
        "server": 0.0,
        "save": 1.0,
        "other": 2.0,
    }
    assert timer.overhead == pytest.approx(0.6)


def test_time_is_counted_despite_failures():
    with collect_timings() as timer:
        with pytest.raises(KeyError), timed("other"), timed("train"):
            raise KeyError
        with timed("save"):
            time.sleep(0.02)
    assert timer.seconds["save"] >= 0.02
    assert timer.seconds["train"] < 0.02


def test_code_outside_of_timers_is_not_counted():
    with collect_timings() as timer:
        pass
    with timed("train"):
        pass
    assert sum(timer.seconds.values()) == timer.overhead == 0.0


def test_the_parts_of_a_run_add_up_to_its_time(smoke, smoke_engine, tmp_path):
    begin = time.perf_counter()
    with collect_timings() as timer:
        federate(smoke(), tmp_path / "run", engine=smoke_engine)
    whole = time.perf_counter() - begin
    assert all(seconds > 0 for seconds in timer.seconds.values())
    assert sum(timer.seconds.values()) < whole


def test_run_with_profile_prints_the_time_of_each_part(capsys, tmp_path):
    small = [
        "data.max_train=4",
        "data.max_test=4",
        "rounds=1",
        "baselines=[]",
        "training.device=cpu",
    ]
    with pytest.raises(SystemExit) as caught:
        main(["run", "smoke", *small, "--profile", "--quiet", "--out", str(tmp_path / "run")])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "neither training nor evaluation" in out
    assert all(part in out for part in ("train", "evaluate", "server", "save", "other"))

"""``fedmerge resume`` and stopped runs: messages, exit codes, and the printed command."""

import os
import re
import shlex
import signal

import pytest

from fedmerge_peft import load_run
from fedmerge_peft.cli import main
from fedmerge_peft.engines import local
from fedmerge_peft.federation import federate as running

TINY = [
    "rounds=3",
    "data.max_train=4",
    "data.max_test=2",
    "training.device=cpu",
    "data.partition={scheme: iid, clients: 3}",
    "baselines=[]",
]


@pytest.fixture
def fedmerge(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def signals(monkeypatch):
    """``signals(5, signal.SIGINT)``: send this process signals while the fifth client trains."""

    def send(client, *numbers):
        calls = []
        train = local.train

        def interrupted(*args):
            calls.append(1)
            if len(calls) == client:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return train(*args)

        monkeypatch.setattr(local, "train", interrupted)

    return send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_round_and_the_printed_command_resumes(fedmerge, signals, number):
    signals(5, number)
    code, out, err = fedmerge("run", "smoke", *TINY, "--out", "my run")
    assert code == 128 + number
    assert "round 2/3" in out
    assert "round 3/3" not in out
    command = re.search(r"stopped; resume with: (.*)", err)[1]
    assert command == "fedmerge resume 'my run'"
    assert signal.getsignal(number) is not None
    code, out, _ = fedmerge(*shlex.split(command)[1:])
    assert code == 0
    assert "after round 2" in out
    assert re.findall(r"round (\d)/3", out) == ["3"]
    assert "run directory: my run" in out
    run = load_run("my run")
    assert run.ended
    assert f"after round 3  served {run.summary['final']['served']['mean']:.3f} (worst" in out


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_a_second_signal_stops_immediately(fedmerge, signals, numbers):
    before = [signal.getsignal(number) for number in numbers]
    signals(5, *numbers)
    code, out, err = fedmerge("run", "smoke", *TINY)
    assert code == 128 + numbers[1]
    assert "round 1/3" in out
    assert "round 2/3" not in out
    assert "resume with: fedmerge resume runs/smoke" in err
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_between_a_run_and_its_baseline_stops_there(fedmerge, signals):
    signals(10, signal.SIGINT)
    code, out, _ = fedmerge("run", "smoke", *TINY, "baselines=[fedavg, local]")
    assert code == 130
    assert re.findall(r"(\w+): 3 clients", out) == ["fedmerge", "fedavg"]
    code, out, _ = fedmerge("resume", "runs/smoke", "--quiet")
    assert code == 0
    assert re.findall(r"(\w+): 3 clients", out) == ["fedavg", "local"]


def test_a_stopped_sweep_prints_the_command_for_the_rest(fedmerge, signals):
    signals(5, signal.SIGTERM)
    arguments = ("sweep", "smoke", "strategy=fedavg,local", *TINY[:-1])
    code, _, err = fedmerge(*arguments)
    assert code == 143
    assert "stopped; repeat the command to continue the sweep" in err
    code, out, _ = fedmerge(*arguments)
    assert code == 0
    assert "[2/2]" in out


def test_a_failure_in_the_middle_prints_the_command(fedmerge, monkeypatch):
    def fail(*_):
        raise RuntimeError("power cut")

    train = local.train
    monkeypatch.setattr(local, "train", fail)
    code, _, err = fedmerge("run", "smoke", *TINY)
    assert code == 2
    assert err.endswith(
        "RuntimeError: power cut\nTo resume from the last finished round: "
        "fedmerge resume runs/smoke\n"
    )
    monkeypatch.setattr(local, "train", train)
    assert fedmerge("resume", "runs/smoke")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["runs/nowhere"], "runs/nowhere holds no run"),
        (
            ["done"],
            (
                "done has ended: its only round is done. "
                "For more rounds: fedmerge resume done rounds=N"
            ),
        ),
        (["done", "seed=3"], "seed: cannot be changed in a resumed run"),
        (["done", "sead=3"], "did you mean 'seed'"),
        (["done", "rounds=0"], "a whole number above 0"),
    ],
)
def test_runs_that_cannot_be_resumed_are_refused_with_code_2(fedmerge, write_run, arguments, text):
    write_run("done", [], [[0.0], [0.5]])
    code, _, err = fedmerge("resume", *arguments)
    assert code == 2
    assert text in err
    assert "Traceback" not in err


def test_an_unfinished_run_is_not_started_again(fedmerge, signals, monkeypatch):
    signals(4, signal.SIGINT)
    fedmerge("run", "smoke", *TINY)
    monkeypatch.setattr(running, "run_recipe", None)
    code, _, err = fedmerge("run", "smoke", *TINY)
    assert code == 2
    assert (
        "Resume the unfinished run with fedmerge resume runs/smoke, or choose another directory, "
        "such as runs/smoke-2\n  fedmerge run smoke " in err
    )

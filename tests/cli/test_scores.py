"""``fedmerge scores``: the tables of an ended run, and errors for other folders."""

import re

import pytest

from fedmerge_peft.cli import main
from fedmerge_peft.engines import local

TINY = [
    "rounds=1",
    "data.max_train=4",
    "data.max_test=2",
    "training.device=cpu",
    "data.partition={scheme: iid, clients: 3}",
]


@pytest.fixture
def fedmerge(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_an_ended_run_shows_its_final_tables_again(fedmerge):
    _, shown, _ = fedmerge("run", "smoke", *TINY)
    code, again, _ = fedmerge("scores", "runs/smoke")
    assert code == 0
    tables = again.split("run directory:")[0]
    assert "worst client" in tables
    assert "learned merging weights" in tables
    assert tables in shown
    assert "\nto run it again: fedmerge run runs/smoke/recipe.yaml --out runs/smoke-2\n" in again


def test_the_printed_command_repeats_the_run_elsewhere(fedmerge):
    fedmerge("run", "smoke", *TINY)
    _, first, _ = fedmerge("scores", "runs/smoke")
    command = "fedmerge run runs/smoke/recipe.yaml --out runs/smoke-2"
    assert first.endswith(f"to run it again: {command}\n")
    assert fedmerge(*command.split()[1:])[0] == 0
    _, second, _ = fedmerge("scores", "runs/smoke-2")
    assert second.split("run directory:")[0] == first.split("run directory:")[0]


def test_an_unfinished_run_is_refused_with_the_command_that_resumes_it(fedmerge, monkeypatch):
    def fail(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(local, "train", fail)
    fedmerge("run", "smoke", *TINY)
    code, out, err = fedmerge("scores", "runs/smoke")
    assert (code, out) == (2, "")
    assert err == "runs/smoke has not ended; continue it with: fedmerge resume runs/smoke\n"


def test_a_folder_without_a_run_is_refused(fedmerge):
    code, _, err = fedmerge("scores", "runs/nowhere")
    assert code == 2
    assert "runs/nowhere holds no run" in err


def test_chosen_values_are_shown(fedmerge, monkeypatch):
    monkeypatch.setattr("fedmerge_peft.federation.tuning._STEPS", 1)
    _, _, log = fedmerge("run", "smoke", *TINY, "training.learning_rate=auto")
    assert "testing learning rates on" in log
    _, shown, _ = fedmerge("scores", "runs/smoke")
    reasons = "chosen from|the default, because none of"
    assert re.search(rf"learning rate 0\.\d+, ({reasons}) \d rates on 2", shown)

"""``fedmerge sweep``: output and exit codes."""

import re

import pytest

from fedmerge_peft.cli import main

TINY = [
    "rounds=1",
    "data.max_train=6",
    "data.max_test=4",
    "training.device=cpu",
    "data.partition={scheme: iid, clients: 3}",
]


@pytest.fixture
def fedmerge(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


def test_each_finished_run_has_a_line_and_the_comparison_comes_last(fedmerge, tmp_path):
    code, out, _ = fedmerge("sweep", "smoke", "strategy.adapters=2,3", *TINY)
    assert code == 0
    lines = out.splitlines()
    ended = [line for line in lines if line.startswith("[")]
    assert [re.sub(r"\d\.\d+", "#", line) for line in ended] == [
        "[1/3] strategy.adapters=2  served # (worst client #)  # s",
        "[2/3] strategy.adapters=3  served # (worst client #)  # s",
        "[3/3] strategy=fedavg  served # (worst client #)  # s",
    ]
    assert (tmp_path / "sweeps" / "smoke" / "strategy=fedavg" / "summary.json").exists()
    assert lines[-1].strip() == "fedmerge compare sweeps/smoke --figure methods.png"
    table = out[out.index("smoke: final") : out.index("next:")]
    assert fedmerge("compare", "sweeps/smoke")[1] == table
    code, out, _ = fedmerge("sweep", "smoke", "strategy.adapters=2,3", *TINY)
    assert (code, out.count("finished before"), table in out) == (0, 3, True)


def test_a_log_without_a_terminal_has_a_line_for_each_round(fedmerge):
    _, out, _ = fedmerge("sweep", "smoke", "strategy.adapters=2,3", "baselines=[]", *TINY)
    shown = re.findall(r"^strategy\.adapters=(\d)  round 1/1  loss", out, re.MULTILINE)
    assert shown == ["2", "3"]


def test_failures_are_listed_at_the_end_with_code_2(fedmerge):
    code, out, err = fedmerge(
        "sweep", "smoke", "task.label=nosuch,queue", "baselines=[]", *TINY, "--out", "here"
    )
    assert code == 2
    assert re.search(r"^\[1/2\] task.label=nosuch  failed: .*nosuch", out, re.MULTILINE)
    assert "[2/2] task.label=queue  served" in out
    assert "smoke: final test accuracy" in out
    assert "1 run of the sweep failed:\ntask.label=nosuch: " in err
    assert "Traceback" not in err


def test_runs_that_cannot_be_compared_are_kept(fedmerge):
    code, out, _ = fedmerge("sweep", "smoke", "task.metrics=[accuracy],[f1]", "baselines=[]", *TINY)
    assert code == 0
    assert "[2/2] task.metrics=f1  served" in out
    assert "no comparison: the runs of smoke report different metrics" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch", "seed=0,1"], "nosuch: no such file or shipped recipe"),
        (["smoke", "sead=0,1"], "did you mean 'seed'?"),
        (["smoke", "seed="], "seed: empty value"),
        (["smoke", "seed=0", "seed=1"], "seed: given twice"),
        (["smoke", "name=../up", "seed=0,1"], "not a valid folder name"),
        (["smoke", "seed=0,1", "--out", "taken"], "taken cannot be written"),
    ],
)
def test_bad_input_is_one_message_and_nothing_starts(fedmerge, tmp_path, arguments, words):
    (tmp_path / "taken").write_text("")
    code, out, err = fedmerge("sweep", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]

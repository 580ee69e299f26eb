"""``fedmerge compare``: tables, files and messages."""

import pandas
import pytest

from fedmerge_peft.cli import main
from fedmerge_peft.util import checked


@pytest.fixture
def fedmerge(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def compare(*arguments, width=120):
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as stopped:
            main(["compare", *arguments])
        return (stopped.value.code or 0, *capsys.readouterr())

    return compare


@pytest.fixture
def runs(write_run):
    for seed in (0, 1, 2):
        write_run(
            f"runs/fedmerge-{seed}",
            ["strategy=fedmerge", f"seed={seed}"],
            [[0.0, 0.2], [0.5, 0.5 + seed / 10]],
        )
        write_run(
            f"runs/fedavg-{seed}", ["strategy=fedavg", f"seed={seed}"], [[0.0, 0.2], [0.4, 0.4]]
        )
        write_run(
            f"runs/local-{seed}", ["strategy=local", f"seed={seed}"], [[0.0, 0.2], [0.3, 0.5]]
        )


@pytest.mark.parametrize("width", [70, 80, 100, 120, 160])
def test_the_table_fits_the_terminal_and_has_a_title(runs, fedmerge, width):
    code, out, err = fedmerge("runs", width=width)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in out
    assert lines[0].strip() == "smoke: final test accuracy of the served models"
    row = next(line for line in lines if line.split()[:1] == ["fedmerge"])
    assert "0.550 ±0.050" in row
    assert ("±0.050 +0.150 ±0.050" in row.replace("  ", " ")) == (width >= 80)
    output = " ".join(out.split())
    assert "Mean ± standard deviation over runs with different seeds." in output
    assert "stayed at the final score of fedavg on the same seed or better." in output
    assert ("seconds" in lines[3]) == (width >= 100)


def test_files_are_written_beside_the_table(runs, fedmerge, tmp_path):
    code, out, _ = fedmerge(
        "runs",
        "--csv",
        "out.csv",
        "--markdown",
        "out.md",
        "--figure",
        "out.svg",
        "--target",
        "0.45",
    )
    assert code == 0
    assert out.splitlines()[-3:] == ["wrote out.csv", "wrote out.md", "wrote out.svg"]
    frame = pandas.read_csv(tmp_path / "out.csv").set_index("method")
    assert frame.loc["fedmerge", "mean"] == pytest.approx(0.55)
    assert frame.loc["fedavg", "gain_over_local"] == pytest.approx(0.0)
    assert list(frame["target"]) == [0.45] * 3
    assert "| fedmerge | 3 | 0.550 ±0.050 |" in (tmp_path / "out.md").read_text()
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_unfinished_runs_are_named_on_standard_error(runs, write_run, fedmerge):
    write_run("runs/stopped", ["seed=9"], [[0.0], [0.5]], finished=False)
    code, _, err = fedmerge("runs")
    assert code == 0
    assert "left out of the comparison (not finished): runs/stopped" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "nosuch does not exist"),
        (["a\x00b"], "embedded null"),
        (["empty"], "empty holds no run"),
        (["empty/file"], "empty/file holds no run"),
        (["runs", "nosuch"], "nosuch does not exist"),
        (["stopped"], "no finished run to compare"),
        (["runs", "--figure", "out.gif"], "out.gif: figures are written as .png, .svg, .pdf"),
        (["runs", "--figure", "out"], "figures are written as"),
        (
            ["runs", "--figure", "no/such/out.png"],
            "no/such/out.png cannot be written: No such file",
        ),
        (["runs", "--csv", "no/such/out.csv"], "no/such/out.csv cannot be written: No such file"),
        (["runs", "--markdown", "empty"], "empty cannot be written: Is a directory"),
        (["runs", "--metric", "f1"], "has no score f1; it has test_accuracy"),
        (["runs", "other"], "report different metrics"),
        ([], "Missing argument"),
        (["runs", "--target", "high"], "--target"),
    ],
)
def test_bad_input_is_one_message(runs, write_run, fedmerge, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    write_run("stopped", [], [[0.0], [0.5]], finished=False)
    write_run("other", ["task.metrics=[f1]", "lora.r=3"], [[0.0], [0.5]], metric="test_f1")
    code, _, err = fedmerge(*arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_a_summary_of_another_version_is_named(runs, fedmerge, tmp_path):
    path = tmp_path / "runs" / "local-0" / "summary.json"
    checked.write_document(path, {"final": {"merged": None}})
    code, _, err = fedmerge("runs")
    assert code == 2
    assert "runs/local-0/summary.json is damaged: rounds is missing" in err


def test_a_recipe_that_cannot_be_read_is_named(runs, fedmerge, tmp_path):
    checked.write_text(tmp_path / "runs" / "local-0" / "recipe.yaml", "rounds: many\n")
    code, _, err = fedmerge("runs")
    assert code == 2
    assert "runs/local-0/recipe.yaml:1: rounds" in err


def test_names_in_the_csv_are_no_formulas(write_run, fedmerge, tmp_path):
    write_run("runs/a", ["name='=HYPERLINK(1)'", "task.text='+text\u202e'"], [[0.0], [0.5]])
    code, _, _ = fedmerge("runs", "--csv", "table.csv")
    assert code == 0
    text = (tmp_path / "table.csv").read_text()
    import csv

    cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
    assert len(cells) > 20
    for cell in cells:
        assert not cell.startswith(("=", "+", "@"))
        assert "\u202e" not in cell

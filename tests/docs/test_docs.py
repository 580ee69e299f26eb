"""Every page of docs/ runs from top to bottom: its files, commands, programs and recipes."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from fedmerge_peft import Recipe, federate
from fedmerge_peft.cli import main
from fedmerge_peft.cli.federate import federate as federate_app
from fedmerge_peft.recipe import diff

ROOT = Path(__file__).parents[2]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
ELSEWHERE = {"extending.md", "two_hospitals.md", "troubleshooting.md"}
"""Pages that have a test of their own."""
TRAINING = [
    "backbone.model=tiny:bert",
    "lora.layers_to_transform=[1]",
    "rounds=1",
    "baselines=[]",
    "data.max_train=6",
    "training.learning_rate=0.01",
    "training.device=cpu",
]
"""Values that make each run small; those of the page itself come before them."""


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page):
    """Return the code blocks of a page in their order."""
    found = re.findall(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', PAGES[page], re.DOTALL | re.M)
    return [Block(*each) for each in found]


def run_line(line, capsys):
    """Run a command; ``make`` prints its plan, ``pip`` is skipped, and sites are not started."""
    command = shlex.split(line, comments=True)
    if command[0] == "torchrun":  # of one rank here; tests/engines starts several
        command = ["fedmerge", *command[command.index("fedmerge_peft") + 1 :]]
    if command[:2] == ["fedmerge", "federate"]:
        # several processes, some of which wait for others: tests/sites starts them
        group = typer.main.get_command(federate_app)
        group.commands[command[2]].make_context(command[2], command[3:])
    elif command[0] == "make":
        planned = subprocess.run(
            [*command, "--dry-run"], cwd=ROOT, capture_output=True, check=False
        )
        assert planned.returncode == 0, line
    elif command[0] in ("head", "mkdir", "cp"):
        subprocess.run(line.replace(" src/", f" {ROOT}/src/"), shell=True, check=True)
    elif command[0] == "python":  # a program that measures for minutes
        assert (ROOT / command[1]).is_file()
    elif command[0] == "fedmerge":
        if "--workers" in command:  # other processes; tests/cli/test_workers.py starts them
            del command[(place := command.index("--workers")) : place + 2]
        with pytest.raises(SystemExit) as stopped:
            main([*command[1:], *small(command[1:])])
        assert not stopped.value.code, (line, capsys.readouterr().err)
    else:
        assert command[0] in ("pip", "scp"), line


def small(command):
    """Return values that make a run small; a sweep keeps those that it gives itself."""
    if command[0] not in ("run", "sweep"):
        return []
    given = {word.partition("=")[0] for word in command} if command[0] == "sweep" else ()
    return [value for value in TRAINING if value.partition("=")[0] not in given]


def is_part_of_a_recipe(block):
    """Read a part of a recipe, and find its values in the result."""
    sections = yaml.safe_load(block.text)
    recipe = Recipe.load("smoke", [f"{key}={json.dumps(value)}" for key, value in sections.items()])
    written = dict(leaves(sections))
    assert {key: diff.flat(recipe).get(key) for key in written} == written


def leaves(section, *above):
    """The values of a part of a recipe, by dotted key."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, *above, key)
        else:
            yield ".".join((*above, key)), value


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The finished run that pages call ``runs/first``."""
    small = ["training.device=cpu", "baselines=[]", "rounds=1", "data.max_train=6"]
    return federate(Recipe.load("smoke", small), tmp_path_factory.mktemp("runs") / "first").path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in ELSEWHERE])
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys, request):
    """A block with a title is a file of that name. Runs use a tiny model."""
    monkeypatch.chdir(tmp_path)
    if "runs/first" in PAGES[page]:
        shutil.copytree(request.getfixturevalue("first"), tmp_path / "runs" / "first")
    names = {}
    for block in blocks(page):
        if block.title:
            path = tmp_path / block.title
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        if block.language == "bash":
            for line in block.text.splitlines():
                run_line(line, capsys)
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "yaml" and not block.title:
            is_part_of_a_recipe(block)
        elif block.language == "yaml":
            Recipe.load(tmp_path / block.title)


def test_every_code_block_names_its_language():
    """Blocks without a language would not be run."""
    for page, text in PAGES.items():
        opening = re.findall(r"^```(.*)$", text, re.MULTILINE)[::2]
        assert all(
            re.match(r"(bash|python|yaml|csv|text|toml)( title=|$)", each) for each in opening
        ), page

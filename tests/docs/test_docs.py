"""Commands, programs and recipes of docs/ run."""

import json
import re
import shlex
import subprocess
from pathlib import Path

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
ELSEWHERE = {"using.md", "extending.md"}
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
    """The working directory of a page's commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages("bash"))
def test_commands_run_in_order(page, here, capsys):
    """Training uses a tiny model; ``make`` is only planned and ``pip`` skipped."""
    for line in "".join(blocks(page, "bash")).splitlines():
        command = shlex.split(line, comments=True)
        if command[0] == "torchrun":  # of one rank here; tests/engines starts several
            command = ["fedmerge", *command[command.index("fedmerge_peft") + 1 :]]
        if command[:2] == ["fedmerge", "federate"]:
            # several processes, some of which wait for others: tests/sites starts them
            parsed(command[2:])
        elif command[0] == "make":
            assert (
                subprocess.run(
                    [*command, "--dry-run"], cwd=ROOT, capture_output=True, check=False
                ).returncode
                == 0
            )
        elif command[0] == "head":
            subprocess.run(line.replace(" src/", f" {ROOT}/src/"), shell=True, check=True)
        elif command[0] == "python":  # a program that measures for minutes
            assert (ROOT / command[1]).is_file()
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
        recipe = Recipe.load(
            "smoke", [f"{key}={json.dumps(value)}" for key, value in sections.items()]
        )
        written = dict(leaves(sections))
        assert {key: diff.flat(recipe).get(key) for key in written} == written


def leaves(section, *above):
    """The values of a part of a recipe, by dotted key."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, *above, key)
        else:
            yield ".".join((*above, key)), value


def test_every_code_block_names_its_language():
    """Blocks without a language would not be run."""
    for page, text in PAGES.items():
        assert all(language for language in re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]), (
            page
        )

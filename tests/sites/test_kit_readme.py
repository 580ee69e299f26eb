"""A site's kit names the package by its file, because nobody owns the name on the index."""

import re

import pytest

from fedmerge_peft import Recipe, __version__
from fedmerge_peft.sites import prepare
from fedmerge_peft.sites.config import FederationFile


def commands_of(digest):
    federation = FederationFile.model_construct(
        project="trial", host="here", port=8002, sites={"north": ["a"]}
    )
    text = prepare.site_readme(federation, "north", Recipe.load("smoke"), digest)
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return text, block.splitlines()


@pytest.mark.parametrize("digest", [None, "ab" * 32])
def test_a_kit_never_installs_the_package_by_its_name(digest):
    text, commands = commands_of(digest)
    installs = [line for line in commands if line.startswith("pip install")]
    assert installs == [f'pip install "./fedmerge_peft-{__version__}-py3-none-any.whl[federate]"']
    assert "SHA-256 sum" in text


def test_a_wheel_is_checked_before_it_is_installed():
    text, commands = commands_of("ab" * 32)
    assert "ab" * 32 in text
    assert commands[0] == "sha256sum --check SHA256SUMS"
    assert commands[1].startswith("pip install")


def test_a_kit_names_the_modules_that_its_recipe_imports():
    federation = FederationFile.model_construct(
        project="trial", host="here", port=8002, sites={"north": ["a"]}
    )
    recipe = Recipe.load("smoke")
    assert "`allow`" not in prepare.site_readme(federation, "north", recipe)
    text = prepare.site_readme(
        federation, "north", recipe.model_copy(update={"plugins": ["mine", "yours"]})
    )
    assert "`plugins: [mine, yours]` under `allow` in `site.yaml`" in text
    assert "--trust-remote-code" in text


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("question-answering", "question, context, answers"),
        ("{name: text-regression, target: score, text_pair: other}", "text, score, other"),
    ],
)
def test_a_kit_names_the_columns_of_any_task(task, columns):
    federation = FederationFile.model_construct(
        project="trial", host="here", port=8002, sites={"north": ["a"]}
    )
    text = prepare.site_readme(federation, "north", Recipe.load("smoke", [f"task={task}"]))
    assert f", columns {columns}.\n" in text

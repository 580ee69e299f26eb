"""Extras are installed by the names of their requirements, never by the name of this package."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import fedmerge_peft
from fedmerge_peft.util import extras

REQUIRES = [
    "numpy>=2",
    'opacus<2,>=1.5; extra == "privacy"',
    'opacus<2,>=1.5; extra == "dev"',
    'colorama>=1; sys_platform == "nowhere" and extra == "privacy"',
]


def test_the_command_names_the_requirements_of_the_extra(monkeypatch):
    monkeypatch.setattr(extras, "requires", lambda _: REQUIRES)
    assert extras.install_command("privacy") == "pip install 'opacus<2,>=1.5'"


@pytest.mark.parametrize("known", [True, False])
def test_an_unknown_extra_is_that_of_a_checkout(monkeypatch, known):
    def requires(_):
        if not known:
            raise PackageNotFoundError
        return REQUIRES

    monkeypatch.setattr(extras, "requires", requires)
    assert extras.install_command("new") == "pip install -e '.[new]'"


def test_no_text_of_the_package_installs_by_its_name():
    by_name = re.compile(r"pip install\s+[\"']?fedmerge[-_]peft\b(?!-)")
    files = Path(fedmerge_peft.__file__).parent.rglob("*.py")
    assert not [file for file in files if by_name.search(file.read_text(encoding="utf-8"))]

"""Extras are installed by the names of their requirements, never by the name of this package."""

from importlib.metadata import PackageNotFoundError

import pytest

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

"""A site's kit names the package by its file, because nobody owns the name on the index."""

import re

from fedmerge_peft import Recipe, __version__
from fedmerge_peft.sites import prepare
from fedmerge_peft.sites.config import Federation


def test_a_kit_never_installs_the_package_by_its_name():
    federation = Federation.model_construct(
        project="trial", host="here", port=8002, sites={"north": ["a"]}
    )
    text = prepare.site_readme(federation, "north", Recipe.load("smoke"))
    commands = re.findall(r"^pip install .*$", text, re.MULTILINE)
    assert commands == [f'pip install "./fedmerge_peft-{__version__}-py3-none-any.whl[federate]"']
    assert "SHA-256 sum" in text

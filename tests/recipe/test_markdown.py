"""The reference of recipes follows from the schema, and the committed one is current."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from fedmerge_peft.cli import main
from fedmerge_peft.recipe import markdown
from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.recipe.section import Section

DOCS = Path(__file__).parents[2] / "docs"


def rows(text):
    """Cells by key, of each table."""
    return [
        re.split(r" (?<!\\)\| ", line.strip("| "))
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def sections(kind=Section):
    """Sections of recipes; a site's settings consist of sections too."""
    for each in kind.__subclasses__():
        if each.__module__.startswith("fedmerge_peft.recipe."):
            yield each
        yield from sections(each)


def test_the_committed_reference_is_current():
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == markdown.reference(), (
        "fedmerge schema --markdown --out docs/recipes.md"
    )


def test_every_key_of_every_section_is_listed():
    keys = {cells[0].strip("`") for cells in rows(markdown.reference())}
    # distinguishes partitions, in headings
    assert {name for section in sections() for name in section.model_fields} - keys == {"scheme"}


def test_a_row_has_type_bounds_default_and_meaning():
    found = {cells[0]: cells[1:] for cells in rows(markdown.reference())}
    kind, default, about = found["`rounds`"]
    assert (kind, default) == ("integer ≥ 1 and ≤ 1,000,000", "`20`")
    assert about.startswith("Number of rounds. ")
    assert found["`max_grad_norm`"][:2] == ["number ≥ 1e-09 and ≤ 1e+09 / null", "`1.0`"]
    assert found["`weight_decay`"][0] == "number ≥ 0 and ≤ 10"
    assert found["`use_dora`"][:2] == ["true or false", "`false`"]
    assert found["`path`"][1] == "**required**"
    assert found["`warm_weight`"][0] == "number > 0 and < 1"


def test_all_defaults_equal_the_schemas():
    listed = {(cells[0].strip("`"), cells[2]) for cells in rows(markdown.reference())}
    for section in [Recipe, *sections()]:
        for name, field in section.model_fields.items():
            if isinstance(field.default, bool | int | float) and not isinstance(
                field.default, BaseModel
            ):
                written = (
                    str(field.default).lower()
                    if isinstance(field.default, bool)
                    else str(field.default)
                )
                assert (name, f"`{written}`") in listed


def test_the_command_prints_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["schema", "--markdown"])
    assert not stopped.value.code
    assert capsys.readouterr().out == markdown.reference()

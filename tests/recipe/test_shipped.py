"""The recipes in the package, and the lookup of recipes by name."""

import re
from pathlib import Path

import pytest

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import Recipe, loading
from fedmerge_peft.recipe.loading import find, shipped

NAMES = [recipe.name for recipe in shipped()]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_named_as_its_file(name):
    assert Recipe.load(name).name == name


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.name)
def test_a_shipped_recipe_has_a_description_and_a_seed(recipe):
    text = recipe.path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert 20 < len(recipe.about) < 110
    assert "\nseed: " in text


def test_the_shipped_recipes_are_these():
    expected = (
        "assistants cifar100_clusters cifar100_dirichlet emotions_multilabel entities_domains "
        "flan_tasks intents_dirichlet pacs_domains preferences quickstart reading "
        "reviews_domains rewriting search_embeddings similarity_regression smoke text_tasks"
    )
    assert set(expected.split()) <= set(NAMES)


def test_the_overrides_in_a_header_are_valid(recipe_file):
    for recipe in shipped():
        text = recipe.path.read_text(encoding="utf-8")
        for line in re.sub(r"\\\n#\s+", "", text).splitlines():  # a backslash continues a line
            if line.startswith("#   fedmerge run "):
                name, *overrides = line.removeprefix("#   fedmerge run ").split()
                assert name == recipe.name
                Recipe.load(name, overrides)


def test_a_shipped_recipe_loads_with_or_without_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("smoke") == find("smoke.yaml")
    assert find("smoke").name == "smoke.yaml"


def test_a_file_with_its_suffix_takes_precedence_over_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smoke.yaml").write_text("name: mine\n", encoding="utf-8")
    assert find("smoke.yaml") == Path("smoke.yaml")
    assert find("smoke") != Path("smoke.yaml")


def test_the_recipes_in_the_wheel_take_precedence(tmp_path, monkeypatch):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "shipped_recipes").mkdir()
    (tmp_path / "shipped_recipes" / "only.yaml").write_text(
        "# The only one\nname: only\n", encoding="utf-8"
    )
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "recipe" / "loading.py"))
    assert [(recipe.name, recipe.about) for recipe in shipped()] == [("only", "The only one")]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            "quikstart",
            (
                "quikstart: no such file or shipped recipe; "
                "did you mean 'quickstart'? (fedmerge ls lists the shipped recipes)"
            ),
        ),
        (
            "nowhere/recipe.yaml",
            (
                "nowhere/recipe.yaml: no such file or shipped recipe "
                "(fedmerge ls lists the shipped recipes)"
            ),
        ),
        ("", "'': no such file or shipped recipe (fedmerge ls lists the shipped recipes)"),
        (
            "a\x00b",
            "a\\x00b: no such file or shipped recipe (fedmerge ls lists the shipped recipes)",
        ),
        (
            "\x1b[31m\n",
            "\\x1b[31m\\n: no such file or shipped recipe (fedmerge ls lists the shipped recipes)",
        ),
        ("x" * 5000, "no such file or shipped recipe (fedmerge ls lists the shipped recipes)"),
        (
            "\udcff",
            "\\udcff: no such file or shipped recipe (fedmerge ls lists the shipped recipes)",
        ),
    ],
    ids=["misspelt", "absent", "empty", "null", "escape", "long", "surrogate"],
)
def test_a_missing_recipe_is_one_message(source, fault):
    with pytest.raises(RecipeError) as caught:
        find(source)
    (found,) = caught.value.faults
    assert found.endswith(fault)
    assert found.isprintable()


def test_a_directory_is_not_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="is a directory; give a YAML file"):
        Recipe.load(tmp_path)


def test_an_unreadable_file_is_one_message(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.touch()

    original = Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RecipeError, match=r"recipe.yaml: cannot be read: Permission denied"):
        Recipe.load(path)

"""Recipes written as YAML."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge_peft.recipe.loading import shipped
from fedmerge_peft.recipe.patterns import pattern_fault
from fedmerge_peft.recipe.schema import Recipe

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        [
            "no",
            "on",
            "1e-4",
            "1_0",
            "2026-01-01",
            "12:30",
            "null",
            "~",
            "",
            " ",
            "=",
            "<<",
            "0x1",
            ".nan",
            "- a",
            "a: b",
            "#",
            "\n",
            "a\n",
            "\x85",
            "\u2028",
        ]
    ),
    st.from_regex(r"[-+0-9.eE_:xo]{1,8}", fullmatch=True),
)
RATES = st.floats(0, 100, exclude_min=True)
PATTERNS = TEXT.filter(lambda text: pattern_fault(text) is None)
SCALARS = st.one_of(
    TEXT,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
NONEMPTY = TEXT.filter(bool)
NAMES = NONEMPTY.filter(lambda text: len(text) <= 200)
MODELS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(
    lambda name: not name.startswith("-")
)
RECIPES = st.fixed_dictionaries(
    {
        "name": NAMES,
        "seed": st.integers(0, 2**63 - 1),
        "task": st.fixed_dictionaries({"name": st.just("causal-lm"), "template": TEXT}),
        "backbone": st.fixed_dictionaries({"model": MODELS}),
        "lora": st.fixed_dictionaries(
            {
                "alpha": st.floats(1e-6, 10_000),
                "target_modules": st.one_of(PATTERNS, st.lists(TEXT), st.none()),
                "rank_pattern": st.dictionaries(PATTERNS, st.integers(1, 9)),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "path": NONEMPTY,
                "filter": st.dictionaries(TEXT, st.one_of(SCALARS, st.lists(SCALARS))),
                "partition": st.fixed_dictionaries({"scheme": st.just("natural"), "by": TEXT}),
            }
        ),
        "training": st.fixed_dictionaries({"learning_rate": RATES}),
    }
)


def check_round_trip(plain, recipe_file):
    recipe = Recipe.model_validate(plain)
    text = recipe.to_yaml()
    again = Recipe.load(recipe_file(text))
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1, 1.0 and True are equal, but not the same
    assert again.to_yaml() == text
    assert text.replace("\n", "").isprintable()


@settings(max_examples=150, deadline=None)
@given(RECIPES)
def test_a_dumped_recipe_loads_equal(recipe_file, plain):
    check_round_trip(plain, recipe_file)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(RECIPES)
def test_more_dumped_recipes_load_equal(recipe_file, plain):
    check_round_trip(plain, recipe_file)


@settings(max_examples=150, deadline=None)
@given(NAMES)
def test_other_yaml_programs_read_the_same_text(name):
    recipe = Recipe.model_validate(
        {
            "name": name,
            "task": "causal-lm",
            "backbone": {"model": "m"},
            "data": {"path": "p", "partition": {"scheme": "iid", "clients": 2}},
        }
    )
    assert yaml.safe_load(recipe.to_yaml())["name"] == name


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.name)
def test_a_shipped_recipe_survives_dumping(recipe, recipe_file):
    loaded = Recipe.load(recipe.name)
    assert Recipe.load(recipe_file(loaded.to_yaml())) == loaded


def test_keys_are_in_the_schemas_order_with_defaults_written_out(minimal, recipe_file):
    plain = yaml.safe_load(Recipe.load(recipe_file(minimal)).to_yaml())
    assert list(plain) == list(Recipe.model_fields)
    assert plain["training"]["learning_rate"] == "auto"
    assert plain["task"]["name"] == "sequence-classification"
    assert plain["strategy"]["name"] == "fedmerge"


@pytest.mark.parametrize(
    ("number", "text"),
    [("1e-4", "0.0001"), ("1e-5", "1.0e-05"), ("1e20", "1.0e+20"), ("3.0", "3.0")],
)
def test_small_and_large_numbers_are_numbers_in_every_yaml(number, text, minimal, recipe_file):
    written = Recipe.load(recipe_file(minimal), [f"data.filter.size={number}"]).to_yaml()
    assert f"size: {text}\n" in written
    assert yaml.safe_load(written)["data"]["filter"]["size"] == float(number)

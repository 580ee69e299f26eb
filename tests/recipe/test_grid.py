"""From ``key=a,b,c`` to a recipe for each combination."""

import pytest

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.grid import expand

ALONE = "baselines=[]"


def test_every_combination_is_named_by_the_values_that_vary():
    recipes = expand("smoke", ["strategy.adapters=3,6", "rounds=5", "seed=0,1", ALONE])
    assert [
        (name, recipe.strategy.adapters, recipe.seed, recipe.rounds)
        for name, recipe in recipes.items()
    ] == [
        ("strategy.adapters=3,seed=0", 3, 0, 5),
        ("strategy.adapters=3,seed=1", 3, 1, 5),
        ("strategy.adapters=6,seed=0", 6, 0, 5),
        ("strategy.adapters=6,seed=1", 6, 1, 5),
    ]


def test_without_variation_the_grid_is_the_recipe_under_its_name():
    assert list(expand("smoke", ["seed=3", ALONE])) == ["smoke"]
    assert list(expand("smoke", ["name='Ålesund, 1/2'", ALONE])) == ["lesund-1-2"]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ("[query,value]", [["query", "value"]]),
        ("[query],[query,value]", [["query"], ["query", "value"]]),
        ("'a,b',c", ["a,b", "c"]),
        (".*[qv]{1,2},all-linear", [".*[qv]{1,2}", "all-linear"]),
        ("query, null", ["query", None]),
    ],
)
def test_commas_inside_a_value_belong_to_it(values, found):
    recipes = expand("smoke", [f"lora.target_modules={values}", ALONE])
    assert [recipe.lora.target_modules for recipe in recipes.values()] == found


def test_sections_are_values():
    recipes = expand("smoke", ["strategy={name: fedmerge, adapters: 6},{name: fedavg}", ALONE])
    assert [recipe.strategy.name for recipe in recipes.values()] == ["fedmerge", "fedavg"]
    assert list(recipes) == ["strategy=name-fedmerge-adapters-6", "strategy=name-fedavg"]


@pytest.mark.parametrize("value", ["rows[1].csv", "../data/a b.csv", "a#b", "a: b"])
def test_values_that_are_no_flow_yaml_are_read_as_in_recipes(value):
    try:
        assert [
            recipe.data.path for recipe in expand("smoke", [f"data.path={value}", ALONE]).values()
        ] == [value]
    except RecipeError as error:
        assert "data.path" in str(error)  # noqa: PT017 - a: b is a section, which no path is


def test_names_are_distinct_folder_names():
    paths = "data.path=a/b,a:b,../../etc," + "x" * 300
    names = list(expand("smoke", [paths, "seed=0,1", ALONE]))
    assert len(set(names)) == 8
    assert all(
        len(name) <= 120
        and name.isascii()
        and not set(name) & set("/:\\ ")
        and not name.startswith(".")
        for name in names
    )


def test_baselines_run_once_for_each_combination_of_the_rest():
    recipes = expand("smoke", ["strategy.adapters=3,6", "seed=0,1", "baselines=[fedavg,local]"])
    assert list(recipes)[4:] == [
        "strategy=fedavg,seed=0",
        "strategy=local,seed=0",
        "strategy=fedavg,seed=1",
        "strategy=local,seed=1",
    ]
    assert not any(recipe.baselines for recipe in recipes.values())
    assert list(expand("smoke", ["seed=0,1"])) == [
        f"strategy={name},seed={seed}" for name in ("fedmerge", "fedavg") for seed in (0, 1)
    ]
    assert list(expand("smoke", ["strategy=fedavg,fedmerge"])) == [
        "strategy=fedavg",
        "strategy=fedmerge",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed"], "expected key=value,value"),
        (["seed="], "seed: empty value"),
        (["seed=0,,1"], "seed: empty value"),
        (["seed=0,"], "seed: empty value"),
        (["seed=0", "seed=1"], "seed: given twice"),
        (["seed=0,1,0"], "seed: duplicate value 0"),
        (["seed=1,0x1"], "seed=1 and seed=0x1 give the same recipe"),
        (["seed=" + ",".join(map(str, range(2000)))], "2,000 combinations"),
        (["seed=a,b", "rounds=0,1"], "rounds: found 0"),
        (
            ["strategy=fedavg,fedmerge", "strategy.adapters=3"],
            "strategy.adapters: not a key of fedavg",
        ),
        (["lora.target_modules=[query,value"], "lora.target_modules"),
    ],
)
def test_bad_input_is_refused_with_the_cause(overrides, words):
    with pytest.raises(RecipeError) as refused:
        expand("smoke", [*overrides, ALONE])
    assert words in str(refused.value)
    assert len(set(refused.value.faults)) == len(refused.value.faults)

"""``key.sub=value``, from the command line or from Python."""

import pytest

from fedmerge_peft import Recipe
from fedmerge_peft.errors import RecipeError


@pytest.fixture
def loaded(minimal, recipe_file):
    def loaded(more="", *overrides):
        return Recipe.load(recipe_file(minimal + more), overrides)

    return loaded


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(loaded):
    file = "training: {learning_rate: 0.5, epochs: 3}\n"
    assert loaded().training.learning_rate == "auto"
    assert loaded(file).training.learning_rate == 0.5
    assert loaded(file, "training.learning_rate=1e-4").training.learning_rate == 1e-4
    assert loaded(file, "training.learning_rate=1e-4").training.epochs == 3
    assert loaded("", "training.learning_rate=1e-4").training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "place", "value"),
    [
        ("lora.target_modules=[query, value]", "lora.target_modules", ["query", "value"]),
        ("lora.target_modules=all-linear", "lora.target_modules", "all-linear"),
        ("training.mixed_precision=no", "training.mixed_precision", "no"),
        ("training.max_grad_norm=null", "training.max_grad_norm", None),
        ("training.max_grad_norm=", "training.max_grad_norm", None),
        ("evaluation.finetuned=off", "evaluation.finetuned", False),
        ("strategy=fedavg", "strategy.name", "fedavg"),
        ("strategy={name: fedmerge, adapters: 3}", "strategy.adapters", 3),
        ("strategy.adapters=3", "strategy.adapters", 3),
        ("task.num_labels=3", "task.num_labels", 3),
        ("data.filter.task=[a,b]", "data.filter", {"task": ["a", "b"]}),
        ("data.filter.my.column=1", "data.filter", {"my.column": 1}),
        (
            "lora.rank_pattern.encoder.layer.0.query=4",
            "lora.rank_pattern",
            {"encoder.layer.0.query": 4},
        ),
        ("name=a=b", "name", "a=b"),
        (" seed = 5 ", "seed", 5),
        ("name=issue#5", "name", "issue#5"),
        ('name="issue #5"', "name", "issue #5"),
        ("name='two\n\n  lines #5'", "name", "two\nlines #5"),
    ],
)
def test_values_are_yaml_at_dotted_keys(text, place, value, loaded):
    found = loaded("", text)
    for step in place.split("."):
        found = getattr(found, step)
    assert found == value


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("issue #5", "a comment"),
        ("#5", "a comment"),
        ("[a, # b\n c]", "a comment"),
        ("'a' # b", "a comment"),
        ("two\nlines", "a line break in unquoted text"),
    ],
)
def test_values_of_which_yaml_drops_a_part_are_refused(value, part, loaded):
    with pytest.raises(RecipeError, match=f"overrides: name: YAML would drop {part}.*; write"):
        loaded("", f"name={value}")


def test_later_overrides_win(loaded):
    assert loaded("", "seed=3", "seed=4").seed == 4
    assert loaded("", "strategy.adapters=4", "strategy=fedavg").strategy.name == "fedavg"


def test_another_name_drops_the_keys_of_the_files_section(loaded):
    assert (
        loaded("strategy: {name: fedmerge, adapters: 4}\n", "strategy.name=fedavg").strategy.name
        == "fedavg"
    )
    partition = loaded(
        "", "data.partition.scheme=dirichlet", "data.partition.alpha=.3"
    ).data.partition
    assert (partition.scheme, partition.clients, partition.alpha) == ("dirichlet", 4, 0.3)
    assert (
        loaded(
            "", "data.partition.scheme=natural", "data.partition.by=organisation"
        ).data.partition.by
        == "organisation"
    )
    assert loaded("", "task.name=image-classification").task.name == "image-classification"


def test_another_name_keeps_the_keys_of_the_overrides(faults, minimal):
    for overrides in (
        ["strategy.adapters=4", "strategy.name=fedavg"],
        ["strategy.name=fedavg", "strategy.adapters=4"],
    ):
        assert faults(minimal, *overrides) == [
            "overrides: strategy.adapters: not a key of fedavg, but of "
            "fedmerge or ifca or fesem or flhc or fedlease or fedem; remove it"
        ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "seed",
            "overrides: found 'seed', expected key=value, such as training.learning_rate=1e-4",
        ),
        ("=3", "overrides: found '=3', expected key=value, such as training.learning_rate=1e-4"),
        (
            "a..b=3",
            "overrides: found 'a..b=3', expected key=value, such as training.learning_rate=1e-4",
        ),
        (
            "name=\udcff",
            (
                "overrides: found 'name=\\udcff', expected key=value, "
                "such as training.learning_rate=1e-4"
            ),
        ),
        (
            "seed.x=3",
            (
                "overrides: seed.x: seed is not a section; write "
                "seed=VALUE with a whole number at least 0"
            ),
        ),
        (
            "baselines.0=local",
            (
                "overrides: baselines.0: baselines is not a section; "
                "write baselines=VALUE with a list of sections with name: "
            ),
        ),
        ("seed=x", "overrides: seed: found text 'x', expected a whole number at least 0"),
        (
            "training.learnin_rate=1",
            "overrides: training.learnin_rate: unknown key; did you mean 'learning_rate'?",
        ),
        ("trainin.epochs=1", "overrides: trainin: unknown key; did you mean 'training'?"),
        (
            "learning_rate=1",
            "overrides: learning_rate: unknown key here; move it under training",
        ),
        ("lora.r=[", "overrides: lora.r: not valid YAML: "),
        (
            "lora.target_modules=*.query",
            (
                "overrides: lora.target_modules: not valid YAML: "
                "anchors (&) and aliases (*) are not supported"
            ),
        ),
        (
            "strategy={name: fedavg, name: local}",
            "overrides: strategy.name: given twice; keep one of them",
        ),
        (
            "data=3",
            "overrides: data: found 3, expected a section (keys with values)",
        ),
    ],
)
def test_errors_of_an_override_name_the_overrides(text, fault, minimal, faults):
    (found,) = faults(minimal, text)
    assert found.startswith(fault)


def test_all_errors_of_all_overrides_are_listed(minimal, faults):
    assert len(faults(minimal, "seed", "=3", "rounds=x", "lora.r=[", "sead=3")) == 5


def test_an_override_does_not_hide_an_invalid_section(minimal, faults):
    found = faults(minimal + "training: 3\n", "training.epochs=2")
    assert (
        found[0]
        == "recipe.yaml:11: training: found 3, expected a section (indented lines of key: value)"
    )


def test_a_recipe_can_be_changed_after_it_was_loaded(loaded):
    first = loaded("strategy: {name: fedmerge, adapters: 4}\n")
    second = first.replace(["strategy.name=fedavg", "lora.rank_pattern.query=2"])
    assert (second.strategy.name, second.lora.rank_pattern) == ("fedavg", {"query": 2})
    assert (first.strategy.name, first.lora.rank_pattern) == ("fedmerge", {})
    assert first.replace([]) == first


def test_errors_of_a_changed_recipe_name_the_overrides(loaded):
    with pytest.raises(
        RecipeError, match=r"^overrides: lora.merge: shared_a requires an exact merge"
    ):
        loaded().replace(["lora.use_dora=true", "lora.merge=shared_a"])


def test_recipe_load_equals_load(minimal, recipe_file):
    path = recipe_file(minimal)
    assert (
        Recipe.load(path, ["seed=9"])
        == Recipe.load(path, ["seed=9"])
        == Recipe.load(str(path)).replace(["seed=9"])
    )

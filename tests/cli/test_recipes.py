"""The commands that list, show, copy and validate recipes."""

import json
import re
from pathlib import Path

import pytest

from fedmerge_peft.cli import main
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.loading import shipped


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fedmerge(capsys):
    """Run a command that succeeds; return its output."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out, err = capsys.readouterr()
        assert (caught.value.code or 0, err) == (0, "")
        return out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that is refused; return the message."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return run


def test_ls_names_every_shipped_recipe_with_its_first_line(fedmerge):
    lines = fedmerge("ls").splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        [recipe.name, recipe.about] for recipe in shipped()
    ]


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.name)
def test_validate_summarizes_a_shipped_recipe_in_one_line(recipe, fedmerge):
    line, _ = fedmerge("validate", recipe.name).splitlines()
    assert line.startswith(f"{recipe.name} is valid: fedmerge with ")


def test_validate_shows_what_overrides_change(fedmerge):
    line, _ = fedmerge(
        "validate", "smoke", "strategy=fedavg", "baselines=[]", "rounds=1", 'name="\\e[31m"'
    ).splitlines()
    assert line == (
        "\\x1b[31m is valid: fedavg, 1 round of sequence-classification on tiny:bert, "
        "data embedded:ticket-subjects (one client for each organisation)"
    )


def test_validate_shows_the_resolved_values_of_a_preset(fedmerge):
    line, values, _ = fedmerge(
        "validate", "smoke", "strategy={name: fedmerge, preset: paper}", "rounds=3"
    ).splitlines()
    assert line.startswith("smoke is valid: fedmerge with 5 adapters, 3 rounds")
    assert values.startswith("preset paper: rounds=3 strategy.adapters=5 strategy.rule=paper")
    assert "training.proximal=0.01" in values
    assert "training.max_grad_norm=null" in values


def test_show_prints_a_recipe_that_loads_back(fedmerge):
    Path("shown.yaml").write_text(
        fedmerge("show", "smoke", "training.learning_rate=1e-4"), encoding="utf-8"
    )
    assert Recipe.load("shown.yaml") == Recipe.load("smoke", ["training.learning_rate=1e-4"])
    assert fedmerge("show", "shown.yaml") == Path("shown.yaml").read_text(encoding="utf-8")


def test_show_escapes_control_characters(fedmerge):
    assert fedmerge("show", "smoke", 'name="\\e[31m\\u202e\\U000E0001"').startswith(
        'name: "\\e[31m\\u202e\\U000E0001"\n'
    )


def test_cp_copies_a_recipe_and_prints_the_next_command(fedmerge):
    assert (
        fedmerge("cp", "smoke") == "Wrote smoke.yaml. Next: edit it, then fedmerge run smoke.yaml\n"
    )
    assert (
        Path("smoke.yaml").read_bytes()
        == next(recipe.path for recipe in shipped() if recipe.name == "smoke").read_bytes()
    )
    assert Recipe.load("smoke.yaml") == Recipe.load("smoke")


def test_cp_writes_to_a_file_or_into_a_folder(fedmerge, folder):
    (folder / "sub").mkdir()
    assert fedmerge("cp", "smoke", "my first.yaml").endswith("fedmerge run 'my first.yaml'\n")
    assert fedmerge("cp", "smoke.yaml", "sub").endswith("fedmerge run sub/smoke.yaml\n")
    assert Recipe.load("my first.yaml") == Recipe.load("sub/smoke.yaml")


def test_cp_never_overwrites(refused):
    Path("smoke.yaml").write_text("mine", encoding="utf-8")
    assert (
        refused("cp", "smoke")
        == "smoke.yaml: already exists and was not changed; give another name\n"
    )
    assert Path("smoke.yaml").read_text(encoding="utf-8") == "mine"


def test_cp_suggests_a_name(refused):
    assert refused("cp", "smoek") == (
        "smoek: no such shipped recipe; did you mean 'smoke'? "
        "(fedmerge ls lists the shipped recipes)\n"
    )


def test_the_schema_describes_every_key(fedmerge):
    schema = json.loads(fedmerge("schema"))
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        assert section["description"], name
        for key, value in section["properties"].items():
            assert {"description", "const", "$ref"} & set(value), f"{name}.{key}"


def test_the_schema_can_be_written_to_a_file(fedmerge):
    assert fedmerge("schema", "--out", "recipe.schema.json") == ""
    assert json.loads(Path("recipe.schema.json").read_text(encoding="utf-8")) == json.loads(
        fedmerge("schema")
    )


def test_the_json_schema_agrees_with_validate(fedmerge):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(fedmerge("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for recipe in shipped():
        validator.validate(Recipe.load(recipe.name).model_dump())
    short = {
        "name": "x",
        "task": "causal-lm",
        "backbone": {"model": "m"},
        "data": {"path": "p", "partition": {"scheme": "iid", "clients": 2}},
    }
    validator.validate(
        {**short, "strategy": "fedavg", "baselines": ["local"], "evaluation": {"finetuned": "no"}}
    )
    assert not validator.is_valid({**short, "strategy": "fedavgg"})
    assert not validator.is_valid({**short, "sead": 1})


def test_validate_states_what_it_checked(fedmerge):
    assert "Not checked: the model, and the data" in fedmerge("validate", "smoke")
    out = fedmerge("validate", "smoke", "--data")
    assert re.search(r"checked: keys, values, and data \(\d+ clients; \d+ train, ", out)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.text=body"], "task.text: there is no column 'body'"),
        (["task.label=lable"], "task.label: there is no column 'lable'"),
        (["data.partition.by=site"], "data.partition.by: there is no column 'site'"),
        (["task={name: causal-lm, text: body}"], "prompt-completion"),
        (["task={name: image-classification, label: queue}"], "there is no column 'image'"),
    ],
)
def test_validate_finds_wrong_columns_before_a_run(overrides, message, fedmerge, capsys):
    fedmerge("validate", "smoke", *overrides)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "smoke", *overrides, "--data"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

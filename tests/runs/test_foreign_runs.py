"""A run directory from somebody else runs no code without consent, and its links are refused."""

import json
import re
import shutil
import sys

import pytest

from fedmerge_peft import BackboneError, Recipe, RecipeError, Run, RunError, load_run, resume
from fedmerge_peft.cli import main
from fedmerge_peft.models import tiny
from fedmerge_peft.runs.cleanup import files_in
from fedmerge_peft.serving.personalize import personalize
from fedmerge_peft.serving.predictor import Predictor
from fedmerge_peft.util import checked

COMMANDS = ("resume", "personalize", "export", "scores", "report", "compare")


def change_recipe(run, *overrides):
    checked.write_text(run / "recipe.yaml", Run.open(run).recipe.replace(overrides).to_yaml())


def arguments(command, run, folder):
    (folder / "new.csv").write_text("text,label\n")
    options = {
        "resume": ["rounds=3"],
        "personalize": ["--data", str(folder / "new.csv")],
        "export": ["--soup", "--to", str(folder / "exported")],
        "report": ["--out", str(folder / "report.html")],
    }
    return [command, str(run), *options.get(command, [])]


def fedmerge(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code or 0


@pytest.fixture
def plugin(run, tmp_path, monkeypatch):
    """A module that the run's recipe lists; importing it leaves a file."""
    change_recipe(run, "name=foreign")
    text = checked.read_text(run / "recipe.yaml")
    assert "plugins: []" in text
    text = text.replace("plugins: []", "plugins: [hostile_module]")
    checked.write_text(run / "recipe.yaml", text)
    mark = tmp_path / "imported"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "hostile_module.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(modules)
    yield mark
    sys.modules.pop("hostile_module", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_runs_plugins_are_not_imported_without_consent(run, plugin, tmp_path, capsys, command):
    assert fedmerge(*arguments(command, run, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml:" in error
    assert "plugins[0]: the import of 'hostile_module' would run its code" in error
    assert "--trust-remote-code" in error
    assert "Traceback" not in error
    assert not plugin.exists()


@pytest.mark.parametrize("command", ["scores", "report", "compare", "export"])
def test_a_runs_plugins_are_imported_with_consent(run, plugin, tmp_path, command):
    assert fedmerge(*arguments(command, run, tmp_path), "--trust-remote-code") == 0
    assert plugin.exists()


def test_consent_in_python_is_an_argument(run, plugin):
    with pytest.raises(RecipeError, match="trust_remote_code=True"):
        load_run(run).recipe  # noqa: B018
    assert not plugin.exists()
    assert load_run(run, trust_remote_code=True).recipe.plugins == ["hostile_module"]
    assert plugin.exists()
    assert load_run(run).recipe.plugins == ["hostile_module"]  # it is imported already


@pytest.mark.parametrize("name", ["secret.json", "./secret", "~/secret.json"])
def test_a_runs_recipe_takes_no_file_for_a_chat_template(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in ("secret.json", "secret"):
        (tmp_path / file).write_text('{"password": "{{ 1 }}"}')
    text = checked.read_text(run / "recipe.yaml")
    before, _, rest = text.partition("task:\n")
    after = rest[re.search(r"^\w", rest, re.MULTILINE).start() :]
    own = f"{before}task:\n  name: causal-lm\n  chat_template: {name}\n{after}"
    (tmp_path / "own.yaml").write_text(own)
    assert "password" in Recipe.load(tmp_path / "own.yaml").task.chat_template
    checked.write_text(run / "recipe.yaml", own)
    with pytest.raises(RecipeError, match=r"task\.chat_template: .* names no file") as refused:
        load_run(run, trust_remote_code=True).recipe  # noqa: B018
    assert "password" not in str(refused.value)


@pytest.fixture
def hostile_model(run, tmp_path, monkeypatch):
    """A model folder inside the run, with code that leaves a file."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = run / "model", tmp_path / "executed"
    tiny.write("bert", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "hostile.Config"}, "model_type": "hostile"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hostile.py").write_text(
        "from transformers import BertConfig\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class Config(BertConfig):\n    model_type = 'hostile'\n"
    )
    change_recipe(run, f"backbone.model={folder}", "backbone.trust_remote_code=true")
    return mark


def test_a_models_code_is_not_run_without_consent(run, hostile_model, tmp_path):
    table = tmp_path / "new.csv"
    table.write_text("text,label\nmy order is late,billing\n")
    opened = load_run(run)
    client = opened.client_names[0]
    for attempt in (
        lambda: resume(run, ["rounds=3"]),
        lambda: personalize(opened, table),
        lambda: Predictor(opened),
        lambda: opened.predict({client: ["hello"]}),
        lambda: opened.client(client).model(),
        lambda: opened.client(client).pipeline(),
    ):
        with pytest.raises(BackboneError, match=r"backbone\.trust_remote_code: .*--trust-remote"):
            attempt()
    for command in ("scores", "report", "compare", "export"):  # these load no model
        assert fedmerge(*arguments(command, run, tmp_path)) == 0
    assert not hostile_model.exists()


def test_a_models_code_runs_with_consent(run, hostile_model):
    opened = load_run(run, trust_remote_code=True)
    with pytest.raises(BackboneError):  # this code defines no model that could be loaded
        opened.client(opened.client_names[0]).model()
    assert hostile_model.exists()


def test_a_model_folder_with_code_is_refused_if_the_recipe_does_not_allow_it(run, hostile_model):
    change_recipe(run, "backbone.trust_remote_code=false")
    opened = load_run(run, trust_remote_code=True)
    with pytest.raises(BackboneError, match="cannot be loaded"):
        opened.client(opened.client_names[0]).model()
    assert not hostile_model.exists()


# ---- links ---------------------------------------------------------------------------------------
def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "recipe.yaml",
        "weights",
        "checkpoint",
        "best",
        "soup.safetensors",
        "exported",
        "personalized",
        "tracking",
        "tracking/elsewhere",
        "baselines",
        "weights/.round-00001.safetensors.1",
    ],
)
def test_links_in_a_run_are_refused(run, finished, tmp_path, capsys, name):
    target = shutil.copytree(finished, tmp_path / "other") / name.partition("/")[0]
    if not target.exists():
        target.mkdir()
    link = run / name
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    before = contents(tmp_path / "other")
    for command in COMMANDS:
        assert fedmerge(*arguments(command, run, tmp_path)) == 2
        assert f"{link} is a link to {target}" in capsys.readouterr().err
    with pytest.raises(RunError, match="is a link"):
        resume(run, ["rounds=3"])
    assert contents(tmp_path / "other") == before


def test_the_run_directory_itself_may_be_a_link(run, tmp_path):
    (tmp_path / "latest").symlink_to(run)
    assert fedmerge("scores", str(tmp_path / "latest")) == 0


def test_links_of_a_tracker_inside_its_folder_are_accepted(run):
    (run / "tracking" / "wandb" / "run-1").mkdir(parents=True)
    (run / "tracking" / "wandb" / "latest-run").symlink_to("run-1")
    assert Run.open(run).ended
    assert len(files_in(run / "tracking")) == 1


def test_special_files_are_refused(run):
    import os

    (run / "summary.json").unlink()
    os.mkfifo(run / "summary.json")
    with pytest.raises(RunError, match=r"summary\.json is not a regular file"):
        Run.open(run)


def test_folders_that_are_nested_too_deep_are_one_error(run, tmp_path, capsys):
    """Python 3.11 walks folders by calls inside calls, of which it permits a thousand."""
    (run / "/".join("d" * 70)).mkdir(parents=True)
    for command in COMMANDS:
        assert fedmerge(*arguments(command, run, tmp_path)) == 2
        assert "nested more than 64 deep" in capsys.readouterr().err


def test_figures_stay_in_their_folder_whatever_the_recipes_name(run, tmp_path):
    change_recipe(run, "name=../../outside")
    for number in (1, 2):
        shutil.copytree(run, tmp_path / f"run-{number}")
    runs = [str(tmp_path / f"run-{number}") for number in (1, 2)]
    out = tmp_path / "one" / "two" / "three"
    out.mkdir(parents=True)
    assert fedmerge("report", *runs, "--out", str(out / "r.html"), "--figures", str(out / "f")) == 0
    assert all(path.is_relative_to(out) for path in (tmp_path / "one").rglob("*.svg"))
    assert list((out / "f").rglob("*.svg"))

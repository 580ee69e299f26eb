"""Plugins are discovered, checked, listed and run like built-in parts."""

import json
import logging
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from fedmerge_peft import (
    Callback,
    PluginError,
    Recipe,
    RecipeError,
    Strategy,
    StrategyRecipe,
    federate,
    plugins,
    register_callback,
    register_metric,
    register_strategy,
)
from fedmerge_peft.cli import main
from fedmerge_peft.data import federate_data
from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.loading import loads
from fedmerge_peft.recipe.markdown import reference
from fedmerge_peft.testing import FormulaClients, isolated_registries

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"

MINE = """
from pydantic import PositiveInt, model_validator
from fedmerge_peft import StrategyRecipe, register_strategy
from fedmerge_peft.strategies.fedavg import FedAvg
from fedmerge_peft.recipe.strategies import ServerRecipe

class MineRecipe(ServerRecipe):
    "A strategy from outside."
    strength: PositiveInt = 3
    "How strong."

    @model_validator(mode="after")
    def _odd(self):
        if self.strength % 2 == 0:
            raise ValueError("strength: even numbers do not work; take an odd one")
        return self

@register_strategy("mine", recipe=MineRecipe)
class Mine(FedAvg):
    pass
"""


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """Restore registries and imported modules after each test."""
    loaded = set(sys.modules)
    with isolated_registries():
        yield
    for name in set(sys.modules) - loaded:
        if name.partition(".")[0] in ("my_plugin", "fedmerge_example"):
            del sys.modules[name]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A plugin in a folder on ``sys.path``; tests may replace its text."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "my_plugin.py"
    path.write_text(MINE)
    return path


def faults(*overrides):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("smoke", overrides)
    return caught.value.faults


def test_a_recipe_names_a_module_and_then_its_strategy(module, minimal):
    text = f"{minimal}plugins: [my_plugin]\nstrategy: {{name: mine, strength: 5}}\n"
    recipe = loads(Recipe, text, "recipe.yaml")
    assert recipe.strategy.strength == 5
    assert isinstance(recipe.strategy, StrategyRecipe)
    assert loads(Recipe, recipe.to_yaml(), "again.yaml") == recipe
    assert Recipe.load("smoke", ["strategy=mine"]).strategy.name == "mine"


def test_the_command_line_names_a_module_in_any_order(module):
    recipe = Recipe.load(
        "smoke", ["strategy.name=mine", "strategy.strength=7", "plugins=[my_plugin]"]
    )
    assert (recipe.strategy.name, recipe.strategy.strength) == ("mine", 7)


@pytest.mark.parametrize(
    ("strategy", "fault"),
    [
        ("{name: mine, strenth: 1}", "strategy.strenth: unknown key; did you mean 'strength'?"),
        (
            "{name: mine, strength: 0}",
            "strategy.strength: found 0, expected a whole number above 0",
        ),
        (
            "{name: mine, strength: 2}",
            "strategy.strength: even numbers do not work; take an odd one",
        ),
        (
            "{name: mine, adapters: 2}",
            "strategy.adapters: not a key of mine, but of fedmerge",
        ),
        (
            "{name: fedavg, strength: 1}",
            "strategy.strength: not a key of fedavg, but of mine",
        ),
        ("{name: min}", "strategy.name: found text 'min', expected one of fedmerge, "),
        ("min", ", mine; did you mean 'mine'?"),
    ],
)
def test_a_plugins_section_has_the_errors_of_built_in_ones(module, minimal, strategy, fault):
    text = f"{minimal}plugins: [my_plugin]\nstrategy: {strategy}\n"
    with pytest.raises(RecipeError) as caught:
        loads(Recipe, text, "recipe.yaml")
    (found,) = caught.value.faults
    assert found.startswith("recipe.yaml:12: ")
    assert fault in found


def test_a_plugins_section_is_in_the_schema(module):
    Recipe.load("smoke", ["plugins=[my_plugin]"])
    assert "### name: mine\n\nA strategy from outside.\n\n| key" in reference()
    assert "| `strength` | integer ≥ 1 | `3` | How strong. |" in reference()
    assert "MineRecipe" in Recipe.model_json_schema()["$defs"]


@pytest.mark.parametrize(
    ("plugin", "fault"),
    [
        (
            "absent_plugin",
            "there is no module 'absent_plugin'; install the package that has it, or add",
        ),
        ("my_plugin.part", "there is no module 'my_plugin.part'"),
        ("./my_plugin.py", "'./my_plugin.py' is not the name of a module"),
        ("my-plugin", "'my-plugin' is not the name of a module"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(module, minimal, plugin, fault):
    text = f"{minimal}plugins:\n  - {plugin}\nstrategy: mine\n"
    with pytest.raises(RecipeError) as caught:
        loads(Recipe, text, "recipe.yaml")
    (found,) = caught.value.faults  # the strategy that it would have registered is not a fault
    assert found.startswith("recipe.yaml:12: plugins[0]: ")
    assert fault in found


def test_a_module_that_fails_is_named_with_the_cause(module):
    module.write_text("import absent_library")
    assert (
        "my_plugin cannot be imported: No module named 'absent_library'"
        in faults("plugins=[my_plugin]")[0]
    )
    module.write_text("1 / 0")
    assert "my_plugin cannot be imported: ZeroDivisionError" in faults("plugins=[my_plugin]")[0]
    module.write_text(MINE.replace('"mine"', '"fedavg"'))
    (found,) = faults("plugins=[my_plugin]")
    assert "'fedavg' of my_plugin is already registered by fedmerge_peft.strategies.fedavg" in found


def test_unknown_names_come_with_a_hint_on_plugins():
    assert "under plugins" in faults("strategy=xyzzy")[0]
    assert "under plugins" not in faults("strategy=fedavgg")[0]
    assert "a registered callback (none is registered)" in faults("callbacks=[xyzzy]")[0]


def test_reading_a_recipe_from_text_imports_nothing(module, minimal):
    text = f"{minimal}plugins: [my_plugin]\n"
    recipe = loads(Recipe, text, "the server's recipe", plugins="ignore")
    assert recipe.plugins == ["my_plugin"]
    assert "my_plugin" not in sys.modules
    with pytest.raises(RecipeError, match="found text 'mine', expected one of"):
        loads(Recipe, f"{text}strategy: mine\n", "the server's recipe", plugins="ignore")


def test_installed_plugins_load_once_and_a_broken_one_is_a_warning(module, monkeypatch, caplog):
    points = [EntryPoint(name, name, plugins.GROUP) for name in ("absent_plugin", "my_plugin")]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points if group == plugins.GROUP else []
    )
    plugins.import_installed.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert Recipe.load("smoke", ["strategy=mine"]).strategy.name == "mine"
        Recipe.load("smoke")
    (record,) = caplog.records
    assert "the plugin absent_plugin" in record.getMessage()
    assert "No module named 'absent_plugin'" in record.getMessage()


def test_a_name_belongs_to_one_module_which_may_register_it_again():
    for _ in range(2):  # as a notebook cell that runs twice

        @register_strategy("again")
        class Again(Strategy):
            """Does nothing."""

    assert STRATEGIES["again"].about == "Does nothing."
    assert Recipe.load("smoke", ["strategy=again"]).strategy.name == "again"
    other = type("Other", (Strategy,), {"__module__": "elsewhere"})
    with pytest.raises(
        PluginError, match=r"'again' of elsewhere is already registered by .*test_plugins"
    ):
        register_strategy("again")(other)


def test_a_section_has_one_name():
    class OneRecipe(StrategyRecipe):
        """One."""

    class Other(Strategy):
        pass

    register_strategy("one", recipe=OneRecipe)(Other)
    with pytest.raises(PluginError, match="OneRecipe, which belongs to 'one'"):
        register_strategy("two", recipe=OneRecipe)(Other)
    with pytest.raises(PluginError, match="recipe=int, expected a class that is derived from"):
        register_strategy("three", recipe=int)(Other)


def test_callbacks_of_a_recipe_join_those_passed(tmp_path, smoke_engine, smoke):
    seen = []

    @register_callback("note")
    class Note(Callback):
        def __init__(self, recipe):
            super().__init__()
            self.name = recipe.name

        def on_round(self, record):
            seen.append((self.name, record.round))

    recipe = smoke("callbacks=[note]", "rounds=1", "baselines=[]")
    passed = Callback(on_round=lambda record: seen.append(("passed", record.round)))
    federate(recipe, tmp_path / "run", engine=smoke_engine, callbacks=[passed])
    assert seen == [("note", 1), ("passed", 1)]


def test_a_metric_is_allowed_for_tasks_with_its_outputs():
    register_metric("guess", of="classes")(lambda predicted, expected: 0.5)
    assert Recipe.load("smoke", ["task.metrics=[guess]"]).task.metrics == ["guess"]
    assert (
        "expected one of perplexity, accuracy, exact_match, rougeL"
        in faults("task={name: causal-lm, metrics: [guess]}")[0]
    )


def test_the_schema_for_editors_has_the_keys_of_plugins(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["schema", "--plugin", "my_plugin"])
    assert not stopped.value.code
    sections = json.loads(capsys.readouterr().out)["$defs"]
    assert sections["MineRecipe"]["properties"]["strength"]["default"] == 3


def test_ls_lists_everything_by_kind_with_its_origin(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ls", "--all", "--plugin", "my_plugin"])
    assert not stopped.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "strategies:",
        "tasks:",
        "partition schemes:",
        "metrics:",
        "aggregation rules:",
        "callbacks: none",
    ]
    (mine,) = (line.split() for line in lines if line.startswith("  mine "))
    assert mine == ["mine", "my_plugin", *["A", "strategy", "from", "outside."]]
    (fedavg,) = (line for line in lines if line.startswith("  fedavg "))
    assert "built-in" in fedavg
    assert "One global adapter for all clients" in fedavg


def test_the_example_runs_from_its_folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    overrides = ["plugins=[fedmerge_example]", "rounds=1", "training.device=cpu"]
    run = federate(Recipe.load(EXAMPLE / "recipe.yaml", overrides), tmp_path / "run")
    assert run.recipe.strategy.caution == 2.0
    assert run.summary["final"]["served"]["metric"] == "test_balanced_accuracy"
    whole = run.recipe.replace(["data.max_train=null"])
    sizes = [client.size for client in federate_data(whole.data, "queue", 0).clients]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 3 * sizes[-1]


def test_the_examples_strategy_is_fedavg_without_caution(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    plugins.import_modules(["fedmerge_example"])
    clients = FormulaClients(4, sizes=[10, 20, 30, 40])
    strategy = clients.strategy("cautious", caution=0)
    clients.round(strategy)
    torch.testing.assert_close(strategy.adapter(0), clients.mean())
    wary = clients.strategy("cautious", caution=5)
    clients.round(wary)
    assert not torch.allclose(wary.adapter(0), clients.mean())


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from fedmerge_peft import Recipe, register_partition; Recipe.load('smoke');"
        "import fedmerge_peft.cli.recipes; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_exits_is_named_with_the_cause(module):
    module.write_text("raise SystemExit('no license')")
    assert (
        "my_plugin cannot be imported: SystemExit: no license" in faults("plugins=[my_plugin]")[0]
    )

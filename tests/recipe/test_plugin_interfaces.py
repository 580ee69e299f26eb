"""Parts of plugins that break their interface are refused, with the plugin and the fault."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedmerge_peft import (
    Callback,
    CallbackRecipe,
    ClientRows,
    DataError,
    PluginError,
    Recipe,
    RecipeError,
    Strategy,
    StrategyRecipe,
    register_aggregation,
    register_callback,
    register_metric,
    register_partition,
    register_strategy,
)
from fedmerge_peft.data import federate_data
from fedmerge_peft.data.schemes import assignment_fault
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.strategies import FedAvgRecipe
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.fedavg import FedAvg
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.tasks.predictions import Predictions
from fedmerge_peft.testing import FormulaClients, isolated_registries


class Renamed(FedAvgRecipe):
    """FedAvg under another name."""


@pytest.fixture(autouse=True)
def isolated():
    """Restore registries after each test."""
    with isolated_registries():
        yield


def test_a_setting_of_a_type_that_yaml_lacks_is_named_in_the_message():
    class PathRecipe(CallbackRecipe):
        """Writes a file."""

        path: Path = Path("log")
        """File."""

    register_callback("path", recipe=PathRecipe)(Callback)
    with pytest.raises(RecipeError) as caught:
        Recipe.load("smoke", ["callbacks=[{name: path, path: log}]"])
    message = "callbacks[0].path: found text 'log', expected a value of type Path"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (
            lambda: register_metric(len),
            "the metric len has no name; pass a name to the decorator, as in @register_metric(",
        ),
        (lambda: register_strategy("../up")(FedAvg), "'../up': a name has letters"),
        (lambda: register_strategy("f")(lambda recipe, context: 0), "is not a class"),
        (
            lambda: register_strategy("s", recipe=StrategyRecipe),
            "expected a class that is derived from StrategyRecipe",
        ),
        (
            lambda: register_strategy("s", recipe=3),
            "recipe=3, expected a class that is derived from",
        ),
        (
            lambda: register_metric("m", of="clases"),
            "of=clases, expected any of classes, class_scores, tokens, texts",
        ),
        (lambda: register_metric("m", of=()), "of=(), expected any of classes, class_scores"),
        (lambda: register_metric("loss"), "every task already has that score"),
        (lambda: register_metric("m", range=(1, 0)), "range=(1, 0), expected the smallest and"),
        (lambda: register_metric("m", range="x"), "range='x', expected the smallest and"),
    ],
)
def test_a_registration_that_could_not_work_is_refused(register, message):
    with pytest.raises(PluginError) as caught:
        register()
    assert message in str(caught.value)


def rows(*numbers):
    return [ClientRows(f"c{i}", np.array(own)) for i, own in enumerate(numbers)]


@pytest.mark.parametrize(
    ("assigned", "message"),
    [
        (None, "no dictionary with the key 'train'"),
        ({"train": []}, "no list of ClientRows for train"),
        ({"train": [("a", np.arange(3))]}, "no list of ClientRows for train"),
        ({"train": [ClientRows("a", np.arange(3))] * 2}, "not unique"),
        ({"train": rows([0.0, 1.0])}, "not a 1-d array of integers"),
        ({"train": rows([True, False])}, "not a 1-d array of integers"),
        ({"train": rows([-1, 2])}, "row numbers for train outside 0 to 611"),
        ({"train": rows([1, 612])}, "row numbers for train outside 0 to 611"),
        ({"train": rows([1, 2], [2, 3])}, "a row of train twice"),
        ({"train": rows([1]), "trial": rows([1])}, "the split 'trial', but the data have train"),
    ],
)
def test_an_assignment_that_is_none_is_named_with_its_scheme(assigned, message):
    register_partition("mine")(lambda recipe, splits: assigned)
    recipe = Recipe.load("smoke", ["data.partition={scheme: mine}"])
    with pytest.raises(DataError, match=r"the scheme 'mine' of .*interfaces returned") as caught:
        federate_data(recipe.data, "queue", 0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("test", "fault"),
    [
        (rows([1], [2]), None),
        (rows([1], [2])[::-1], "other clients for test than for train, or in another order"),
        ([ClientRows("c0", np.arange(1)), ClientRows("d", np.arange(1))], "other clients for test"),
        (rows([1]), "different numbers of clients for test (1) and train (2)"),
    ],
)
def test_each_split_has_the_same_clients_in_the_same_order(test, fault):
    tables = {split: Dataset.from_dict({"text": ["a", "b", "c"]}) for split in ("train", "test")}
    found = assignment_fault({"train": rows([0], [1, 2]), "test": test}, tables)
    assert found == fault if fault is None else found.startswith(fault)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self: vars(self).pop("soup"), "it has no AdapterSoup"),
        (lambda self: setattr(self, "state_fields", ("gone",)), "strategy lacks: gone; set"),
        (lambda self: vars(self).update(state_fields=("lr",), lr=0.5), "lr, a float, which cannot"),
    ],
)
def test_a_strategy_that_could_not_run_or_resume_is_refused_at_its_start(change, message):
    @register_strategy("broken")
    class Broken(Strategy):
        weights = torch.ones(4, 1)

        def __init__(self, recipe, context):
            self.soup = FormulaClients(4).strategy("fedavg").soup
            change(self)

        def update(self, replies):
            pass

    with pytest.raises(PluginError, match=r"'broken' of .*test_plugin_interfaces") as caught:
        FormulaClients(4).strategy("broken")
    assert message in str(caught.value)


def test_a_metric_registered_again_replaces_the_first_and_its_failure_is_named():
    predictions = Predictions(1.0, 1.0, {"classes": ([1], [1])})
    for value in (0.25, 0.75):
        register_metric("cell")(lambda predicted, expected, value=value: value)
        assert score(["cell"], predictions)["cell"] == value
    register_metric("cell")(lambda predicted, expected: "good")
    with pytest.raises(
        PluginError, match=r"the metric 'cell' of .*interfaces failed at .*: ValueError"
    ):
        score(["cell"], predictions)


def test_an_error_in_update_names_the_plugin_and_its_line():
    @register_strategy("breaks", recipe=Renamed)
    class Breaks(FedAvg):
        """Fails."""

        def update(self, replies):
            torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(
        PluginError, match=r"strategy 'breaks' of .* failed at .*interfaces.py:\d+: "
    ):
        list(FormulaClients(4).federation("strategy.name=breaks", "rounds=1").rounds())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda soup: soup.rows * torch.nan, "after update, soup.rows is not finite"),
        (lambda soup: soup.rows[:, :1], "after update, soup.rows is a float32 tensor"),
    ],
)
def test_a_soup_that_cannot_be_merged_after_update_is_refused(change, message):
    @register_strategy("spoils", recipe=Renamed)
    class Spoils(FedAvg):
        """Leaves an unusable soup."""

        def update(self, replies):
            self.soup.rows = change(self.soup)

    with pytest.raises(PluginError, match=message):
        list(FormulaClients(4).federation("strategy.name=spoils", "rounds=1").rounds())


@pytest.mark.parametrize("declared", [True, False])
def test_the_number_of_adapters_may_change_if_the_strategy_says_so(declared):
    class Grows(FedAvg):
        """Has an adapter more after each round."""

        @property
        def weights(self):
            return torch.full((4, len(self.soup)), 1 / len(self.soup))

        def update(self, replies):
            self._grow(len(self.soup) + 1)

        def _grow(self, adapters):
            self.soup = self.soup.with_rows(self.soup.rows[:1].repeat(adapters, 1), adapters)

    if declared:
        Grows.resize = Grows._grow
    register_strategy("grows", recipe=Renamed)(Grows)
    found = FormulaClients(4).federation("strategy.name=grows", "rounds=2")
    if declared:
        list(found.rounds())
        assert found.strategy.weights.shape == (4, 3)
    else:
        with pytest.raises(PluginError, match=r"after update, soup\.rows is a float32 tensor"):
            list(found.rounds())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda deltas, weights, recipe: deltas, "its result is a float32 tensor"),
        (lambda deltas, weights, recipe: deltas[:1] * torch.inf, "its result is not finite"),
        (lambda deltas, weights: deltas[:1], "failed at .*: TypeError"),
    ],
)
def test_a_rule_whose_result_is_no_update_is_refused(rule, message):
    register_aggregation("odd")(rule)
    aggregator = Aggregator(RobustnessRecipe(aggregation="odd"))
    with pytest.raises(PluginError, match=f"aggregation rule 'odd' of .*{message}"):
        aggregator.combine(torch.ones(3, 5), torch.ones(3, 1), torch.ones(3))

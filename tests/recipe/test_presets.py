"""``strategy.preset``: values of several sections for keys that a recipe does not set."""

import pytest

from fedmerge_peft import Recipe
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.presets import PRESETS

PAPER = "strategy: {name: fedmerge, preset: paper}\n"


@pytest.fixture
def load(minimal, recipe_file):
    return lambda more="", *overrides: Recipe.load(recipe_file(minimal + more), overrides)


def test_the_preset_paper_is_the_authors_program(load):
    recipe = load(PAPER)
    strategy, training = recipe.strategy, recipe.training
    assert recipe.rounds == 500
    assert (strategy.adapters, strategy.rule, strategy.start) == (5, "paper", "independent")
    assert (strategy.weights_lr, strategy.lr, strategy.momentum) == (0.01, 1.0, 0.0)
    assert (training.optimizer, training.learning_rate, training.momentum) == ("sgd", 0.01, 0.0)
    assert (training.batch_size, training.epochs, training.steps) == (32, 2, None)
    assert (training.proximal, training.max_grad_norm, training.weight_decay) == (0.01, None, 0.0)
    assert recipe.clients.fraction == 1.0
    assert recipe.evaluation.serve == "best"
    assert recipe.seed == 1  # not a key of the preset


@pytest.mark.parametrize("more", [PAPER, "strategy: {preset: paper, name: fedmerge}\n"])
def test_keys_set_by_hand_win_over_the_preset(more, load):
    recipe = load(more + "rounds: 7\ntraining: {epochs: 1, max_grad_norm: 0.5}\n")
    assert (recipe.rounds, recipe.training.epochs, recipe.training.max_grad_norm) == (7, 1, 0.5)
    assert recipe.training.batch_size == 32
    recipe = load(more, "rounds=3", "strategy.adapters=9", "training.learning_rate=auto")
    assert (recipe.rounds, recipe.strategy.adapters) == (3, 9)
    assert recipe.training.learning_rate == "auto"


def test_the_preset_can_be_set_on_the_command_line(load):
    assert load("", "strategy.preset=paper") == load(PAPER)
    assert load(PAPER, "strategy.preset=null") == load("strategy: {name: fedmerge}\n")
    other = load(PAPER, "strategy=fedavg")
    assert (other.rounds, other.training) == (load().rounds, load().training)


def test_sections_in_python_have_the_preset_too(load):
    values = dict(load())
    values["strategy"] = load(PAPER).strategy.model_copy(update={"adapters": 3})
    del values["rounds"], values["training"], values["evaluation"]
    recipe = Recipe(**values)
    assert (recipe.rounds, recipe.strategy.adapters, recipe.training.epochs) == (500, 3, 2)


def test_the_record_states_the_resolved_values_and_reads_back_equal(load, recipe_file):
    recipe = load(PAPER, "rounds=2")
    assert Recipe.load(recipe_file(recipe.to_yaml())) == recipe
    for section, values in PRESETS["paper"].items():
        for key, value in values.items():
            expected = 2 if key == "rounds" else value
            assert getattr(getattr(recipe, section) if section else recipe, key) == expected


def test_an_unknown_preset_is_an_error_at_its_line(minimal, faults):
    (fault,) = faults(minimal + "strategy: {name: fedmerge, preset: papre}\n")
    assert fault == (
        "recipe.yaml:11: strategy.preset: found text 'papre', expected paper or null; "
        "did you mean 'paper'?"
    )
    (fault,) = faults(minimal + "strategy: {name: fedavg, preset: paper}\n")
    assert "strategy.preset: not a key of fedavg, but of fedmerge; remove it" in fault


def test_other_errors_are_those_of_the_recipe_alone(minimal, faults):
    (fault,) = faults(minimal + PAPER + "training: 3\n")
    assert fault.startswith("recipe.yaml:12: training: found 3, expected a section")
    (fault,) = faults(minimal + PAPER + "training: {batch_size: 0}\n")
    assert fault.startswith("recipe.yaml:12: training.batch_size: found 0, expected")
    (fault,) = faults(minimal + PAPER + "clients: {fraction: 0.5}\n")
    assert "serve: best compares the validation losses of all clients" in fault
    (fault,) = faults(minimal + "strategy: fedavg\nbaselines: [{name: fedmerge, preset: paper}]\n")
    assert "baselines: a preset also sets rounds and training" in fault


def test_a_complete_recipe_refuses_a_new_preset(load):
    with pytest.raises(RecipeError, match=r"strategy.preset: has no effect on a complete recipe"):
        load().replace(["strategy.preset=paper"])
    assert load(PAPER).replace(["rounds=3"]).training.epochs == 2

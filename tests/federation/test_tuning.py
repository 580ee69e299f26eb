"""The learning rate that a run chooses is the best of its range test, once for the whole run."""

import json
import logging
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedmerge_peft import (
    Callback,
    ClientError,
    Recipe,
    RecipeError,
    Run,
    RunError,
    federate,
    resume,
)
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.federation import tuning
from fedmerge_peft.federation.rate_choice import lowest, smallest_tied
from fedmerge_peft.federation.tuning import Decisions, decide, drawn_clients
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.hyperparameters import Hyperparameters, automatic_epochs

AUTO = ["training.learning_rate=auto", "training.epochs=auto", "data.validation_fraction=0.25"]


def client(number, size=10, validation=4):
    return SimpleNamespace(name=str(number), size=size, validation=range(validation))


class FormulaEngine:
    """Clients whose losses are functions of the rate: ``losses[client](rate)``.

    The trained adapter is 0 - log10(rate), so that scores reveal the rate. New adapters are 0.
    A loss of None is a failure.
    """

    simulated = True

    def __init__(self, losses, start=1.0, validation=4, training=lambda rate: 1.0):
        self.clients = [client(number, validation=validation) for number in range(len(losses))]
        self.start, self._losses, self._training = start, losses, training
        self.backbone = SimpleNamespace(set_base=lambda _: None)
        self.trained = []

    def strategy_context(self):
        return SimpleNamespace(fresh_row=lambda _: torch.zeros(3))

    def train_clients(self, round, assignments):
        assert round == 0
        for index, assignment in assignments:
            rate = assignment.hyperparameters.learning_rate
            self.trained.append((index, rate, len(assignment.plan.phases)))
            loss = self._training(rate)
            if self._losses[index](rate) is None:
                yield assignment.plan, ClientError(str(index), round, "not finite")
                continue
            deltas = torch.full((1, 3), math.log10(rate), dtype=torch.float32)
            yield (
                assignment.plan,
                Reply(index, deltas, self.clients[index].size, loss, 0.0, round=0),
            )

    def evaluate_clients(self, served, completed=0):
        for index, row in served:
            rate = 10 ** -float(row[0])
            fresh = bool((row == 0).all())
            loss = self.start if fresh else self._losses[index](float(f"{rate:.2g}"))
            yield index, {"validation_loss": loss}

    @property
    def rates(self):
        return sorted({rate for _, rate, _ in self.trained})


def recipe(*overrides):
    return Recipe.load("smoke", [*AUTO, *overrides])


def chosen(engine, *overrides):
    entry = decide(recipe(*overrides), engine).document["learning_rate"]
    return entry["value"], entry["reason"]


def valley(best, depth=0.5):
    """A loss that is lowest at a rate, ``depth`` below 1, and 0.1 higher per factor of 10."""
    return lambda rate: 1 - depth + 0.1 * abs(math.log10(rate / best))


GRID = [5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2]


@pytest.mark.parametrize("best", GRID[1:-1])
def test_the_rate_with_the_lowest_loss_is_chosen(best):
    engine = FormulaEngine([valley(best)] * 8)
    assert chosen(engine) == (best, "chosen from 5 rates on 4 clients")
    assert engine.rates == GRID
    assert len(engine.trained) == 4 * 5


@pytest.mark.parametrize(
    ("best", "tested"),
    [
        (0.05, [*GRID, 0.15]),
        (0.15, [*GRID, 0.15, 0.5]),
        (0.5, [*GRID, 0.15, 0.5]),
        (5e-4, [1.5e-4, *GRID]),
        (5e-5, [5e-5, 1.5e-4, *GRID]),
    ],
)
def test_the_grid_is_extended_while_the_best_rate_is_at_its_end(best, tested):
    engine = FormulaEngine([valley(best)] * 2)
    assert chosen(engine)[0] == best
    assert engine.rates == tested


@pytest.mark.parametrize(
    ("alone", "training", "value"),
    [
        (1.5e-3, 5e-2, (1.5e-3 * 1.5e-2) ** 0.5),  # the training loss is lowest two rates above
        (5e-3, 5e-2, (5e-3 * 1.5e-2) ** 0.5),
        (1.5e-2, 5e-2, 1.5e-2),
        (1.5e-2, 5e-3, 1.5e-2),  # higher than the rate by training loss, which bounds nothing
    ],
)
def test_a_rate_at_which_clients_alone_overfit_is_not_too_high(alone, training, value):
    engine = FormulaEngine([valley(alone)] * 4, training=valley(training))
    assert chosen(engine)[0] == pytest.approx(value)


def test_sgd_has_higher_rates():
    engine = FormulaEngine([valley(0.3)] * 2)
    assert chosen(engine, "training.optimizer=sgd")[0] == 0.3
    assert engine.rates == [1e-2, 3e-2, 1e-1, 3e-1, 1.0]


def test_equal_losses_go_to_the_smaller_rate():
    engine = FormulaEngine([lambda rate: 0.5 if rate >= 5e-3 else 0.9] * 4)
    assert chosen(engine)[0] == 5e-3


@pytest.mark.parametrize(
    ("ratios", "rate"),
    [
        # the differences 0.3, -0.1, 0.2, -0.2 have the mean 0.05 and the standard error 0.12
        ([[0.8, 0.4, 0.7, 0.3], [0.5, 0.5, 0.5, 0.5]], 0),
        ([[0.6, 0.61, 0.6, 0.61], [0.5, 0.5, 0.5, 0.5]], 1),
        ([[0.51], [0.5]], 1),
        ([[0.5], [0.5]], 0),
        ([[math.inf, 0.1], [0.5, 0.5]], 1),
        ([[0.7, 0.6], [math.inf, 0.1]], 0),
    ],
)
def test_a_difference_within_one_standard_error_is_a_tie(ratios, rate):
    ratios = np.array(ratios)
    assert smallest_tied(ratios, lowest(ratios)) == rate


def test_a_rate_at_which_a_client_fails_loses():
    def fails(rate):
        return None if rate > 1.5e-3 else valley(5e-2)(rate)

    def diverges(rate):
        return math.nan if rate > 1.5e-3 else valley(5e-2)(rate)

    for one in (fails, diverges):
        engine = FormulaEngine([one, *[valley(5e-2)] * 3])
        engine.clients = engine.clients[:2]
        engine.clients[0].size = 99  # the larger half
        assert chosen(engine) == (1.5e-3, "chosen from 5 rates on 1 client")


def test_a_client_that_always_fails_takes_no_part(caplog):
    engine = FormulaEngine([valley(1.5e-2), lambda rate: None, valley(1.5e-2), valley(1.5e-2)])
    for number, size in enumerate((9, 9, 1, 1)):
        engine.clients[number].size = size
    assert chosen(engine) == (1.5e-2, "chosen from 5 rates on 1 client")
    assert "1 takes no part in the choice of the learning rate" in caplog.text


def test_if_all_clients_fail_the_error_names_the_key_and_the_clients():
    with pytest.raises(RecipeError, match=r"learning_rate: auto found no finite loss on 0, 1;"):
        chosen(FormulaEngine([lambda rate: None] * 4, validation=0))


@pytest.mark.parametrize("validation", [0, 4])
def test_the_training_loss_decides_if_the_validation_loss_cannot(validation):
    noise = [lambda rate: 1.1, lambda rate: 0.9] * 4
    engine = FormulaEngine(noise, validation=validation, training=valley(1.5e-2))
    entry = decide(recipe(), engine).document["learning_rate"]
    assert (entry["value"], entry["measure"]) == (1.5e-2, "training loss")
    assert (entry["start"] is None) == (validation == 0)


def test_if_no_rate_learns_the_default_is_used():
    engine = FormulaEngine([lambda rate: 1.0] * 8)
    assert chosen(engine) == (
        5e-3,
        "the default, because none of 7 rates on 4 clients reduced the loss",
    )


def test_private_runs_are_not_tested():
    engine = FormulaEngine([valley(1.5e-2)] * 4)
    privacy = "privacy={mode: local, clip: 1.0, noise: 1.0}"
    assert chosen(engine, privacy, "strategy=fedavg")[0] == 5e-3
    assert engine.trained == []


def test_small_clients_repeat_their_rounds(monkeypatch):
    monkeypatch.setattr(tuning, "_STEPS", 30)
    engine = FormulaEngine([valley(1.5e-2)] * 2)  # ten examples in batches of eight
    chosen(engine, "training.epochs=1", "training.batch_size=8")
    assert {phases for *_, phases in engine.trained} == {15}  # of two steps
    engine = FormulaEngine([valley(1.5e-2)] * 2)
    chosen(engine, "training.steps=31")
    assert {phases for *_, phases in engine.trained} == {1}


def test_clients_are_drawn_from_the_larger_half_of_those_with_validation_examples():
    clients = [client(number, size=number) for number in range(20)]
    draws = {seed: drawn_clients(clients, seed) for seed in range(8)}
    assert all(len(draw) == 4 and min(draw) >= 9 for draw in draws.values())
    assert len({tuple(draw) for draw in draws.values()}) > 1
    assert draws == {seed: drawn_clients(clients, seed) for seed in range(8)}
    for each in clients[10:]:
        each.validation = ()
    assert all(0 < index < 10 for seed in range(8) for index in drawn_clients(clients, seed))
    with pytest.raises(RecipeError, match="needs clients with training examples"):
        drawn_clients([client(0, size=0)], 0)


@pytest.mark.parametrize(
    ("size", "rounds", "epochs"),
    [
        (40, 20, 2),  # five steps in a pass
        (80, 20, 1),
        (8, 20, 4),  # no more than four passes
        (1000, 20, 1),
        (40, 200, 2),  # ten steps also in many rounds
        (80, 10, 2),  # 200 steps in few rounds
        (80, 2, 4),
    ],
)
def test_epochs_give_about_200_steps_in_the_run_and_10_in_a_round(size, rounds, epochs):
    training = Recipe.load("smoke", ["training.batch_size=8"]).training
    assert automatic_epochs(training, rounds, [size, 1, 10**6, 0, 0]) == epochs
    accumulating = training.model_copy(update={"batch_size": 2, "gradient_accumulation": 4})
    assert automatic_epochs(accumulating, rounds, [size]) == epochs
    assert automatic_epochs(training.model_copy(update={"steps": 3}), rounds, [size]) == 1


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def short_trials():
    """One round of local training at each rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def auto(smoke):
    return smoke(
        *AUTO, "strategy=fedavg", "rounds=3", "baselines=[local]", "evaluation.finetuned=false"
    )


@pytest.fixture(scope="module")
def engine(auto):
    return LocalEngine.from_recipe(auto)


@pytest.fixture(scope="module")
def whole(auto, engine, tmp_path_factory):
    """A run of ``auto``, with a copy of its directory after the second round in ``part``."""
    folder = tmp_path_factory.mktemp("runs")

    def copy(record):
        if record.round == 2 and not (folder / "part").exists():
            shutil.copytree(folder / "whole", folder / "part")

    return federate(auto, folder / "whole", engine=engine, callbacks=[Callback(on_round=copy)])


def test_the_choice_is_recorded_and_the_recipe_keeps_auto(whole):
    assert whole.recipe.training.learning_rate == whole.recipe.training.epochs == "auto"
    entry = whole.decisions["learning_rate"]
    assert entry["value"] in {trial["learning_rate"] for trial in entry["trials"]}
    assert whole.training.learning_rate == entry["value"]
    assert whole.training.epochs == whole.decisions["epochs"]["value"] == 4
    assert len(entry["trials"][0]["validation_loss"]) == 3  # half of six clients
    assert entry["reduced_loss"] is True


def test_baselines_share_the_choice(whole):
    (local,) = whole.baselines.values()
    assert local.decisions == whole.decisions


def test_the_same_seed_gives_the_same_choice(whole, auto, engine, caplog):
    with caplog.at_level(logging.INFO, tuning.__name__):
        again = decide(auto, engine).document
    for entry in (again["learning_rate"], whole.decisions["learning_rate"]):
        entry.pop("seconds", None)
    assert again == whole.decisions
    value, reason = (again["learning_rate"][key] for key in ("value", "reason"))
    assert caplog.messages[-2:] == [
        f"epochs {again['epochs']['value']}, from the clients' median size",
        f"learning rate {value:g}, {reason}",
    ]


def test_a_run_with_the_chosen_values_by_hand_is_the_same(whole, auto, tmp_path):
    training = whole.training
    by_hand = auto.replace(
        [f"training.learning_rate={training.learning_rate}", f"training.epochs={training.epochs}"]
    )
    run = federate(by_hand, tmp_path / "run", engine=LocalEngine.from_recipe(by_hand))
    assert not (run.path / "decisions.json").exists()
    assert torch.equal(run.soup.rows, whole.soup.rows)


def test_a_resumed_run_equals_an_uninterrupted_one_without_another_test(
    whole, engine, tmp_path, left_behind, monkeypatch
):
    part = tmp_path / "part"
    shutil.copytree(whole.path.parent / "part", part)
    monkeypatch.setattr(tuning._RangeTest, "run", lambda *_: pytest.fail("another test"))
    resume(part, engine=engine)
    assert left_behind(part) == left_behind(whole.path)


def test_an_interrupted_test_is_repeated(auto, engine, whole, tmp_path, left_behind, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tuning._RangeTest, "drop_failed", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            federate(auto, tmp_path / "run", engine=engine)
    assert not (tmp_path / "run" / "decisions.json").exists()
    resume(tmp_path / "run", engine=engine)
    assert left_behind(tmp_path / "run") == left_behind(whole.path)


def test_more_rounds_keep_the_epochs(whole, engine, tmp_path):
    shutil.copytree(whole.path, tmp_path / "run")
    run = resume(tmp_path / "run", ["rounds=4"], engine=engine)
    assert run.decisions == Run.open(whole.path).decisions


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        '{"learning_rate": {}}',
        '{"learning_rate": {"value": -1}}',
        '{"learning_rate": {"value": NaN}}',
        '{"learning_rate": {"value": 11}}',
        '{"learning_rate": {"value": true}}',
        '{"epochs": {"value": 0.5}}',
        '{"epochs": {"value": 1000}}',
        '{"other": {"value": 1}}',
    ],
)
def test_damaged_decisions_are_one_error(whole, tmp_path, document):
    shutil.copytree(whole.path, tmp_path / "run")
    (tmp_path / "run" / "decisions.json").write_text(document)
    with pytest.raises(RunError, match=r"decisions\.json cannot be read"):
        resume(tmp_path / "run", ["rounds=5"])


def test_values_are_written_as_they_are_read():
    values = Hyperparameters(0.03, 2)
    assert Hyperparameters.parse(json.loads(json.dumps(values.to_dict()))) == values
    assert Decisions({}).hyperparameters == Hyperparameters()

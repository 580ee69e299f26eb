"""Strategies that share an engine train the same job once, with the same results."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmerge_peft import Federation
from fedmerge_peft.engines import local
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.engines.score_cache import ScoreCache, score_key
from fedmerge_peft.engines.training_cache import TrainingCache
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.loop import Job
from fedmerge_peft.training.plan import Train, Trained

WARM = "strategy={name: fedmerge, adapters: 3, start: warm, warm_rounds: 2}"
METHODS = [WARM, "strategy=fedavg", "strategy=local"]


@pytest.fixture(autouse=True)
def training_is_not_cached():
    """Cache trained adapters, which the fixture of this name disables in other tests."""


@pytest.fixture
def trained(monkeypatch):
    """Jobs that were trained, in their order."""
    jobs, train = [], local.train

    def counted(runtime, training, batch):
        jobs.extend(batch)
        return train(runtime, training, batch)

    monkeypatch.setattr(local, "train", counted)
    return jobs


def outcome(recipe, engine):
    """A federation's soup and records, without times."""
    federation = Federation(recipe, engine)
    records = [replace(record, seconds=0.0) for record in federation.rounds()]
    return federation.strategy.soup.rows, records, federation.evaluate()


def assert_same_outcome(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1:] == other[1:]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("prefix", [[], ["lora.layers_to_transform=[1]"]], ids=["all", "frozen"])
def test_results_on_a_shared_engine_are_those_on_engines_of_their_own(
    smoke, trained, prefix, fraction
):
    recipes = [
        smoke(method, "rounds=3", f"clients.fraction={fraction}", *prefix) for method in METHODS
    ]
    alone = [outcome(recipe, LocalEngine.from_recipe(recipe)) for recipe in recipes]
    asked = len(trained)
    engine = LocalEngine.from_recipe(recipes[0])
    for recipe, expected in zip(recipes, alone, strict=True):
        assert_same_outcome(outcome(recipe, engine), expected)
    cohort = asked // 9
    assert asked - (len(trained) - asked) >= 3 * cohort  # two warm rounds, and local's first
    for recipe, expected in zip(recipes, alone, strict=True):  # all of it again, from the cache
        assert_same_outcome(outcome(recipe, engine), expected)
    assert len(trained) < 2 * asked


def test_a_cached_job_counts_the_seconds_of_its_training(smoke, trained):
    engine = LocalEngine.from_recipe(smoke())
    row = engine.strategy_context().fresh_row(0)
    (_, first), (_, second) = (
        next(engine.train_clients(1, [(0, Assignment(Train(row)))])) for _ in range(2)
    )
    assert len(trained) == 1
    assert second.seconds == pytest.approx(first.seconds, rel=0.5)
    assert torch.equal(first.deltas, second.deltas)


def test_a_recipe_that_trains_otherwise_gets_a_cache_of_its_own(smoke):
    engine = LocalEngine.from_recipe(smoke())
    assert engine.with_recipe(smoke("strategy=fedavg")).training_cache is engine.training_cache
    other = engine.with_recipe(smoke("training.learning_rate=0.5"))
    assert other.training_cache is not engine.training_cache


def test_nothing_that_trained_on_other_frozen_weights_is_taken(smoke, trained):
    engine = LocalEngine.from_recipe(smoke())
    row, backbone = engine.strategy_context().fresh_row(0), engine.backbone
    assignments = [(0, Assignment(Train(row)))]
    next(engine.train_clients(1, assignments))
    name = next(iter(backbone.scaling))
    weight = backbone.model.get_submodule(name).base_layer.weight
    for _ in range(2):
        backbone.set_base({name: torch.full_like(weight, 0.1)})
        next(engine.train_clients(1, assignments))
    backbone.set_base({})
    next(engine.train_clients(1, assignments))
    assert len(trained) == 3


def test_jobs_that_share_a_pass_are_trained_each_time(smoke, trained):
    engine = LocalEngine.from_recipe(smoke("training.clients_per_batch=3"))
    row = engine.strategy_context().fresh_row(0)
    for _ in range(2):
        list(engine.train_clients(1, [(client, Assignment(Train(row))) for client in range(3)]))
    assert len(trained) == 6


# ---- the cache alone ---------------------------------------------------------------------------


def job(**changes):
    fields = {"seed": 1, "indices": np.arange(3), "row": torch.ones(4), **changes}
    seed, indices = fields.pop("seed"), fields.pop("indices")
    chosen = {key: fields.pop(key) for key in ("learning_rate", "epochs") if key in fields}
    return Job(Train(**fields), indices, seed, Hyperparameters(**chosen))


def result(job):
    return Trained(job.train.row + 1, 0.5, 2)


CHANGES = [
    {"seed": 2},
    {"indices": np.arange(1, 4)},
    {"row": torch.ones(4).index_fill(0, torch.tensor([3]), -1.0)},
    {"phases": (torch.tensor([True, False, True, True]),)},
    {"phases": (None, None)},
    {"proximal": 0.0},
    {"proximal": 0.1},
    {"anchor": torch.ones(4)},
    {"example_weights": torch.ones(4)},
    {"learning_rate": 1e-3},
    {"learning_rate": 1e-2},
    {"epochs": 2},
]


def test_whatever_changes_the_training_is_another_job():
    cache, calls = TrainingCache(), []
    for one in [job(), *(job(**change) for change in CHANGES)] * 2:
        cache.get_or_train(one, lambda one=one: calls.append(one) or result(one))
    assert len(calls) == 1 + len(CHANGES)


def test_changing_an_outcome_does_not_change_the_cache():
    cache = TrainingCache()
    for _ in range(3):
        row = cache.get_or_train(job(), lambda: result(job())).trained.row
        assert row.tolist() == [2.0] * 4
        row.zero_()


def test_a_full_cache_keeps_the_first_jobs():
    cache, calls = TrainingCache(max_bytes=2 * 16), []
    for _ in range(2):
        for seed in (1, 2, 3):
            one = job(seed=seed)
            cache.get_or_train(one, lambda one=one: calls.append(one.seed) or result(one))
    assert calls == [1, 2, 3, 3]


def test_a_failed_job_is_tried_again():
    cache = TrainingCache()

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.get_or_train(job(), fail)
    assert cache.get_or_train(job(), lambda: result(job())).trained.loss == 0.5


def test_the_score_cache_keeps_the_adapters_used_last():
    cache, missing = ScoreCache(), []
    for number in [0, 1, 2, 3, 4, 5, 6, 7, 0, 8, 0, 1]:
        key = score_key(torch.tensor([float(number)]))
        if cache.find("a", key) is None:
            missing.append(number)
            cache.store("a", key, {"loss": number})
        assert cache.find("a", key) == {"loss": number}
        assert cache.find("b", key) is None
    assert missing == [0, 1, 2, 3, 4, 5, 6, 7, 8, 1]

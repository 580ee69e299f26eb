"""Jobs train with their own values for the keys of ``training`` that are auto."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from equality import assert_near
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from training.bench import Bench

OPEN = {"learning_rate": "auto", "epochs": "auto"}
VALUES = [
    Hyperparameters(0.01, 2),
    Hyperparameters(0.001, 2),
    Hyperparameters(0.1, 1),
    Hyperparameters(0.01, 1),
]


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "sgd", "momentum": 0.9}, {"schedule": "linear", "max_grad_norm": 0.1}],
    ids=str,
)
def test_jobs_of_a_pass_have_their_own_learning_rates_and_epochs(tiny_models, options):
    bench = Bench(tiny_models, **OPEN, **options)
    training = bench.recipe.training
    jobs = [
        Job(Train(bench.row), np.arange(10), number, values) for number, values in enumerate(VALUES)
    ]
    for job, together in zip(jobs, train(bench.runtime, training, jobs), strict=True):
        (alone,) = train(bench.runtime, training, [job])
        assert_near(together.row, alone.row, bench.row)
        assert together.steps == alone.steps == 3 * job.hyperparameters.epochs
        by_hand = replace(job, hyperparameters=Hyperparameters())
        section = job.hyperparameters.apply_to(training)
        assert torch.equal(train(bench.runtime, section, [by_hand])[0].row, alone.row)


@pytest.mark.parametrize("key", OPEN)
def test_a_value_that_the_recipe_leaves_open_must_be_given(tiny_models, key):
    bench = Bench(tiny_models, **{key: "auto"})
    with pytest.raises(ValueError, match=rf"training\.{key} is auto"):
        bench.train()

"""Random valid recipes end with finite adapters and scores, or are refused with one error."""

import math
import os
import random
import signal
from contextlib import contextmanager

import pytest
import torch
from PIL.Image import new

from federation.random_data import write_data
from federation.random_recipes import SCHEMA, random_recipe
from fedmerge_peft import federate
from fedmerge_peft.errors import FedMergeError

QUICK, ALL = range(8), range(8, int(os.environ.get("FEDMERGE_RANDOM_RECIPES", "40")))
"""Numbers of recipes. After a new key of recipes, try 1000."""
SECONDS = 120
"""Processor time of a run; usual ones take two."""
INPUTS = {
    "sequence-classification": "where is my parcel",
    "causal-lm": "where is my",
    "image-classification": new("RGB", (24, 20), "orange"),
}


class LateError(BaseException):
    """A run took too long. It is not an ``Exception``, so that no client's failure hides it."""


@contextmanager
def time_limit():
    """Raise ``LateError`` after ``SECONDS`` of processor time."""

    def late(*_):
        raise LateError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def unusual(value, key=""):
    """Yield the keys of numbers in a document that are not finite."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from unusual(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from unusual(inner, key)
    elif value in ("Infinity", "-Infinity", "NaN") or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        yield key


def check(number, models, data, folder):
    recipe = random_recipe(random.Random(number), models, data)
    print(recipe.model_dump(exclude_unset=True))  # pytest shows it with a failure
    try:
        with time_limit():
            run = federate(recipe, folder / "run")
    except FedMergeError:
        return
    # The perplexity is the exponential of a finite loss, which may exceed all numbers.
    assert {key for key in unusual(run.summary) if not key.endswith("perplexity")} == set()
    soup, weights = run.state()
    assert torch.isfinite(soup.rows).all()
    assert torch.isfinite(torch.as_tensor(weights)).all()
    if not recipe.strategy.single_adapter:
        return
    name, example = run.client_names[0], INPUTS[recipe.task.name]
    pairs = getattr(recipe.task, "text_pair", None) is not None
    (prediction,) = run.predict({name: [(example, example) if pairs else example]})[name]
    if recipe.task.name == "causal-lm":
        assert isinstance(prediction, str)
    else:
        assert 0 <= prediction["score"] <= 1
    run.save_adapter(name, folder / "export")


@pytest.mark.filterwarnings("ignore")  # of libraries, about unusual values
@pytest.mark.parametrize("number", QUICK)
def test_a_random_recipe_ends_or_is_refused(number, tiny_models, data, tmp_path):
    check(number, tiny_models, data, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", ALL)
def test_many_random_recipes_end_or_are_refused(number, tiny_models, data, tmp_path):
    check(number, tiny_models, data, tmp_path)


def test_random_recipes_have_values_for_every_key(tiny_models, data):
    drawn = set()
    for number in range(400):
        recipe = random_recipe(random.Random(number), tiny_models, data)
        for section, values in recipe.model_dump(exclude_unset=True).items():
            drawn |= {(section, key) for key in values} if isinstance(values, dict) else set()
    for section in ("lora", "training", "clients", "evaluation", "robustness", "privacy", "stop"):
        keys = SCHEMA["$defs"][SCHEMA["properties"][section]["$ref"].rpartition("/")[2]]
        missing = {key for key in keys["properties"] if (section, key) not in drawn}
        assert not missing, section

"""A small finished run, and copies of it that a test may change."""

import shutil

import pytest

from fedmerge_peft import federate

TINY = ["data.max_train=4", "data.max_test=2", "evaluation.finetuned=false", "rounds=2"]


@pytest.fixture(scope="module")
def finished(smoke, smoke_engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    recipe = smoke(*TINY)
    return federate(recipe, path, engine=smoke_engine.with_recipe(recipe)).path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")

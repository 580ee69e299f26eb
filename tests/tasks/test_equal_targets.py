"""A warning states that all training examples have the same target."""

import logging

import pytest
from datasets import Dataset

from fedmerge_peft import Recipe, federate

WARNING = "all training examples of {} have the same target, so there is nothing to learn"


def warnings_of(task, columns, tmp_path, caplog):
    rows = {name: values * 6 for name, values in columns.items()}
    recipe = Recipe(
        name="mine",
        rounds=1,
        task={"name": task},
        backbone={"model": "tiny:bert"},
        lora={"r": 2, "target_modules": ["query"]},
        data={"path": "memory", "partition": {"scheme": "natural", "by": "by"}},
        training={"learning_rate": 0.01, "epochs": 1, "device": "cpu"},
    )
    with caplog.at_level(logging.WARNING, logger="fedmerge_peft"):
        federate(recipe, tmp_path / "run", data=Dataset.from_dict({**rows, "by": ["x"] * 12}))
    return WARNING.format(task) in caplog.text


TEXTS, WORDS = {"text": ["a parcel", "a badge"]}, {"tokens": [["a", "parcel"], ["a"]]}
CHOICES = {"context": ["a", "b"], "choices": [["c", "d"], ["e", "f"]]}


@pytest.mark.parametrize(
    ("task", "columns", "warned"),
    [
        ("text-regression", {**TEXTS, "label": [2.0, 2.0]}, True),
        ("text-regression", {**TEXTS, "label": [2.0, 1.0]}, False),
        ("multi-label-classification", {**TEXTS, "labels": [["a", "b"], ["b", "a"]]}, True),
        ("multi-label-classification", {**TEXTS, "labels": [["a", "b"], ["b"]]}, False),
        ("token-classification", {**WORDS, "ner_tags": [["O", "B-X"], ["O"]]}, False),
        ("multiple-choice", {**CHOICES, "label": [0, 0]}, False),
    ],
)
def test_equal_targets_are_counted_as_nothing_to_learn(task, columns, warned, tmp_path, caplog):
    assert warnings_of(task, columns, tmp_path, caplog) == warned

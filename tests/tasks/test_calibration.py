"""The expected calibration error equals its definition."""

import numpy as np
import pytest
import torch

from fedmerge_peft import register_metric
from fedmerge_peft.tasks import Predictions
from fedmerge_peft.tasks.calibration import expected_calibration_error
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.testing import isolated_registries
from tasks.made_examples import made

NAME = "expected_calibration_error"


def by_definition(probabilities, labels):
    """Compute Σ_b n_b/n · |accuracy_b - confidence_b| bin by bin."""
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        own = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if low < max(row) <= high or (number == 0 and max(row) == 0)
        ]
        if own:
            confidence, accuracy = np.mean(own, axis=0)
            total += len(own) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 5])
def test_it_equals_its_definition(classes):
    random = np.random.default_rng(classes)
    scores = random.dirichlet(np.ones(classes) * 0.5, 200).tolist()
    labels = random.integers(0, classes, 200).tolist()
    assert expected_calibration_error(scores, labels) == pytest.approx(
        by_definition(scores, labels), abs=1e-12
    )


def test_each_label_is_a_prediction_if_an_example_has_several():
    random = np.random.default_rng(0)
    scores, labels = random.random((30, 4)), random.integers(0, 2, (30, 4))
    pairs = [[1 - p, p] for p in scores.ravel().tolist()]
    assert expected_calibration_error(scores.tolist(), labels.tolist()) == pytest.approx(
        by_definition(pairs, labels.ravel().tolist()), abs=1e-12
    )


def test_certainty_is_calibrated_if_it_is_right():
    certain = [[1.0, 0.0], [0.0, 1.0]]
    assert expected_calibration_error(certain, [0, 1]) == 0
    assert expected_calibration_error(certain, [1, 0]) == 1


@pytest.mark.parametrize(
    "name", ["sequence-classification", "token-classification", "multi-label-classification"]
)
def test_tasks_with_labels_have_it(task_of, name):
    table, section = made(name, 8) if name != "sequence-classification" else (None, {"name": name})
    if table is None:
        table = made("multi-label-classification", 8)[0].remove_columns("labels")
        table = table.add_column("label", [n % 3 for n in range(8)])
    task = task_of("bert", table, metrics=[NAME], **section)
    labels = task.collate(task.encode(table), np.arange(8))["labels"]
    shape = labels.shape if name == "multi-label-classification" else (*labels.shape, 3)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if name == "token-classification":
        logits = torch.randn(*labels.shape, len(task.labels))
    predictions = Predictions()
    predictions.add(task.predict(logits, labels))
    found = score(task.metrics, predictions)[NAME]
    if name == "multi-label-classification":
        p = logits.sigmoid().flatten()
        scores, expected = torch.stack([1 - p, p], 1), labels.long().flatten()
    else:
        own = labels >= 0
        scores, expected = logits[own].softmax(-1), labels[own]
    assert found == pytest.approx(by_definition(scores.tolist(), expected.tolist()), abs=1e-6)


def test_probabilities_are_computed_for_metrics_that_read_them(task_of):
    table = made("multi-label-classification", 4)[0].remove_columns("labels")
    table = table.add_column("label", [0, 1, 0, 1])
    logits, labels = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    plain = task_of("bert", table, name="sequence-classification")
    assert plain.predict(logits, labels).keys() == {"classes"}
    with isolated_registries():

        @register_metric("brier", of="class_scores", greater_is_better=False)
        def brier(predicted, expected):
            return float(np.square(np.array(predicted) - np.eye(2)[expected]).sum(axis=1).mean())

        task = task_of("bert", table, name="sequence-classification", metrics=["brier"])
        predictions = Predictions()
        predictions.add(task.predict(logits, labels))
        assert score(["brier"], predictions)["brier"] == 0.5

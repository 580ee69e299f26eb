"""Several labels for each text: their columns, their loss, and their metrics."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import average_precision_score, f1_score

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks import Predictions
from fedmerge_peft.tasks.metrics import score

NAME = "multi-label-classification"
METRICS = ["micro_f1", "macro_f1", "average_precision"]


def table_of(**columns):
    count = len(next(iter(columns.values())))
    return Dataset.from_dict({"text": [f"text {n}" for n in range(count)], **columns})


def scores_of(predicted, expected, probabilities=None):
    outputs = {"label_sets": (predicted, expected)}
    if probabilities is not None:
        outputs["label_scores"] = (probabilities, expected)
    return score(METRICS, Predictions(outputs=outputs))


def labels_of(task, table):
    return task.collate(task.encode(table), np.arange(len(table)))["labels"].tolist()


def test_lists_and_columns_of_flags_are_the_same_labels(task_of):
    lists = table_of(labels=[["a"], [], ["b", "a"]])
    flags = table_of(a=[1, 0, 1], b=[False, False, True])
    expected = [[1, 0], [0, 0], [1, 1]]
    task = task_of("bert", lists, name=NAME)
    assert task.labels == ["a", "b"]
    assert labels_of(task, lists) == expected
    task = task_of("bert", flags, name=NAME, labels=["a", "b"])
    assert task.labels == ["a", "b"]
    assert labels_of(task, flags) == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"labels": [["a"], ["b", "b"]]}, {}, r"row 1 .*'labels' has a label twice: b, b"),
        ({"labels": [["a"], None]}, {}, r"row 1 .*'labels' is empty"),
        ({"labels": ["a", "b"]}, {}, r"'labels' has the type string, expected lists"),
        ({"labels": [[], []]}, {}, r"has no values to infer labels from"),
        ({"a": [0, 2]}, {"labels": ["a"]}, r"row 1 .*'a' has 2, expected 0 or 1"),
        ({"a": [0, None]}, {"labels": ["a"]}, r"row 1 .*'a' is empty"),
        ({"a": ["yes", "no"]}, {"labels": ["a"]}, r"'a' has the type string, expected 0 and 1"),
        ({"a": [0, 1]}, {"labels": ["b"]}, r"task.labels: there is no column 'b'"),
    ],
)
def test_unsuitable_labels_are_refused(task_of, columns, options, message):
    table = table_of(**columns)
    with pytest.raises(DataError, match=message):
        task_of("bert", table, name=NAME, **options).encode(table)


def test_an_unknown_label_is_refused_with_its_row(task_of):
    task = task_of("bert", table_of(labels=[["a"], ["b"]]), name=NAME)
    with pytest.raises(DataError, match=r"row 1 .*'c', which is not a known label.*a, b"):
        task.encode(table_of(labels=[["a"], ["c"]]))


def test_the_threshold_decides_about_sets_and_answers_not_about_probabilities(task_of):
    table = table_of(labels=[["a"], ["b"]])
    task = task_of("bert", table, name=NAME, threshold=0.25)
    logits = torch.tensor([0.2, 0.3]).logit()[None]
    compared = task.predict(logits, torch.tensor([[0.0, 1.0]]))
    assert compared["label_sets"] == ([[0, 1]], [[0, 1]])
    assert compared["label_scores"][0][0] == pytest.approx([0.2, 0.3])
    (answer,) = task.answers(logits, task.encode(table), np.array([0]))
    assert answer == {"labels": ["b"], "scores": [pytest.approx(0.3)]}


def test_a_mixture_has_the_mean_probabilities(task_of):
    task = task_of("bert", table_of(labels=[["a"], ["b"]]), name=NAME)
    parts = [torch.tensor([[0.1, 0.9]]), torch.tensor([[0.5, 0.2]])]
    mixed = task.mix([part.logit() for part in parts], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(mixed.sigmoid(), 0.25 * parts[0] + 0.75 * parts[1])


def test_metrics_equal_scikit_learn():
    random = np.random.default_rng(0)
    expected = random.integers(0, 2, (40, 5))
    probabilities = random.random((40, 5))
    predicted = (probabilities >= 0.5).astype(int)
    found = scores_of(predicted.tolist(), expected.tolist(), probabilities.tolist())
    assert found["micro_f1"] == f1_score(expected, predicted, average="micro")
    assert found["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert found["average_precision"] == pytest.approx(
        average_precision_score(expected, probabilities, average="macro")
    )


@pytest.mark.parametrize(
    ("predicted", "expected", "values"),
    [
        ([[0, 0]], [[0, 0]], ["nan", "nan"]),
        ([[0, 0]], [[1, 0]], ["0.0", "0.0"]),
        ([[1, 0], [0, 0]], [[1, 0], [0, 0]], ["1.0", "1.0"]),
    ],
)
def test_clients_with_few_labels_have_defined_scores_without_warnings(predicted, expected, values):
    found = scores_of(predicted, expected)
    assert [str(found["micro_f1"]), str(found["macro_f1"])] == values

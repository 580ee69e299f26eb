"""Numbers from texts and images: their columns, their loss, and their metrics."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks import Predictions
from fedmerge_peft.tasks.metrics import greater_is_better, score
from tasks.made_examples import rated

NAME = "text-regression"
METRICS = ["mse", "mae", "pearson", "spearman"]


def table_of(labels):
    return Dataset.from_dict({"text": [f"text {n}" for n in range(len(labels))], "label": labels})


def scores_of(predicted, expected):
    return score(METRICS, Predictions(outputs={"values": (predicted, expected)}))


def test_losses_are_squared_errors_also_of_the_value_that_marks_missing_labels(task_of):
    table = table_of([0.5, -100.0, 2.0])
    task = task_of("bert", table, name=NAME)
    labels = task.collate(task.encode(table), np.arange(3))["labels"]
    losses, counts = task.losses(torch.tensor([[1.0], [-99.0], [2.0]]), labels)
    assert losses.tolist() == [0.25, 1.0, 0.0]
    assert task.count_terms(labels) == counts.sum() == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0, None], r"row 1 .*'label' is empty"),
        ([1.0, math.nan], r"row 1 .*'label' has nan, expected a finite number"),
        ([1.0, math.inf], r"row 1 .*'label' has inf"),
        (["0.5", "high"], r"row 1 .*'high' in column 'label' is not a number; write numbers such"),
        (["1,5", "2"], r"row 0 .*'1,5' in column 'label' is not a number"),
        (["1", "inf"], r"row 1 .*'label' has inf"),
        ([1e13, 0.0], r"task.target: column 'label' has magnitudes up to 1e\+13"),
    ],
)
def test_targets_that_are_no_finite_numbers_are_refused(task_of, labels, message):
    table = table_of(labels)
    with pytest.raises(DataError, match=message):
        task_of("bert", table, name=NAME).encode(table)


def test_numbers_of_images_have_the_same_checks(task_of):
    table = rated(3).remove_columns("label")
    for labels, message in (([0.5, None, 1.0], r"row 1 .*'label' is empty"), (["a"] * 3, "row 0")):
        with pytest.raises(DataError, match=message):
            task_of("vit", table.add_column("label", labels), name="image-regression")
    with pytest.raises(DataError, match=r"task.target: there is no column 'age'; the data have"):
        task_of("vit", rated(3), name="image-regression", target="age")


def test_targets_that_are_written_as_text_are_numbers(task_of):
    table = table_of(["0.50", " -1.25", "1e-3", "007"])  # as programs write csv files
    labels = task_of("bert", table, name=NAME).encode(table).columns["labels"]
    assert torch.stack(labels).tolist() == pytest.approx([0.5, -1.25, 1e-3, 7.0])


def test_the_names_of_folders_are_numbers_and_not_their_order(task_of):
    ages = ClassLabel(names=["20", "35.5"])
    table = table_of([1, 0, 1]).cast_column("label", ages)
    labels = task_of("bert", table, name=NAME).encode(table).columns["labels"]
    assert torch.stack(labels).tolist() == [35.5, 20.0, 35.5]
    animals = table_of([1, 0]).cast_column("label", ClassLabel(names=["cat", "dog"]))
    with pytest.raises(DataError, match=r"row 0 .*'dog' in column 'label' is not a number"):
        task_of("bert", animals, name=NAME).encode(animals)


def test_decimals_of_databases_are_numbers(task_of):
    table = table_of([Decimal("1.50"), Decimal("-2.25")])
    labels = task_of("bert", table, name=NAME).encode(table).columns["labels"]
    assert torch.stack(labels).tolist() == [1.5, -2.25]


def test_a_warning_names_targets_that_a_new_head_learns_slowly(task_of, caplog):
    table = table_of([1200, 800])
    task_of("bert", table, name=NAME).encode(table)
    assert "column 'label' has magnitudes up to 1.2e+03" in caplog.text


def test_metrics_equal_those_of_scikit_learn_and_scipy():
    random = np.random.default_rng(0)
    expected = random.integers(0, 5, 30) / 2
    predicted = expected + random.normal(size=30)
    assert scores_of(predicted.tolist(), expected.tolist()) == pytest.approx(
        {
            "loss": math.nan,
            "mse": mean_squared_error(expected, predicted),
            "mae": mean_absolute_error(expected, predicted),
            "pearson": pearsonr(predicted, expected).statistic,
            "spearman": spearmanr(predicted, expected).statistic,
        },
        rel=1e-12,
        nan_ok=True,
    )
    assert [name for name in METRICS if greater_is_better(name)] == ["pearson", "spearman"]


@pytest.mark.parametrize(
    ("predicted", "expected", "value"),
    [([1.0, 2.0], [3.0, 3.0], "nan"), ([1.0], [3.0], "nan"), ([2.0, 2.0], [3.0, 4.0], "0.0")],
)
def test_correlations_of_equal_values_are_defined_without_warnings(predicted, expected, value):
    found = scores_of(predicted, expected)
    assert str(found["pearson"]) == str(found["spearman"]) == value


def test_a_mixture_predicts_the_weighted_mean(task_of):
    task = task_of("bert", table_of([0.0, 1.0]), name=NAME)
    mixed = task.mix([torch.tensor([[1.0]]), torch.tensor([[3.0]])], torch.tensor([0.25, 0.75]))
    assert mixed.tolist() == [[2.5]]

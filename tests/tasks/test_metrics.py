from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fedmerge_peft.tasks import Predictions
from fedmerge_peft.tasks.metrics import greater_is_better, is_fraction, metric, score

IDS = ["accuracy", "f1", "matthews_correlation"]
TEXTS = ["exact_match", "rougeL"]


def predictions_of(predicted: list[int], expected: list[int]) -> Predictions:
    return Predictions(1.0, 2.0, {"classes": (predicted, expected)})


def test_known_answers():
    scores = score(IDS, predictions_of([0, 1, 1, 0], [0, 1, 0, 0]))
    # class 0: precision 2/2, recall 2/3; class 1: precision 1/2, recall 1/1
    assert scores == pytest.approx(
        {
            "loss": 0.5,
            "accuracy": 0.75,
            "f1": (4 / 5 + 2 / 3) / 2,
            "matthews_correlation": math.sqrt(1 / 3),
        }
    )


def test_class_metrics_equal_sklearn():
    generator = np.random.default_rng(0)
    for _ in range(5):
        predicted, expected = generator.integers(0, 5, (2, 40))
        scores = score(IDS, predictions_of(predicted.tolist(), expected.tolist()))
        assert scores["accuracy"] == accuracy_score(expected, predicted)
        assert scores["f1"] == f1_score(expected, predicted, average="macro", zero_division=0)
        assert scores["matthews_correlation"] == matthews_corrcoef(expected, predicted)


@pytest.mark.parametrize(
    ("predicted", "expected", "accuracy", "f1"),
    [
        ([2, 2], [2, 2], 1.0, 1.0),
        ([1, 1], [2, 2], 0.0, 0.0),
        ([1, 2], [2, 2], 0.5, 1 / 3),
        ([2], [2], 1.0, 1.0),
        ([0, 0], [0, 1], 0.5, 1 / 3),
    ],
)
def test_clients_with_one_class_have_defined_scores_without_warnings(
    predicted, expected, accuracy, f1
):
    scores = score(IDS, predictions_of(predicted, expected))
    assert scores == pytest.approx(
        {"loss": 0.5, "accuracy": accuracy, "f1": f1, "matthews_correlation": 0.0}
    )


def test_texts_are_compared_whole_and_by_words():
    predictions = Predictions(1.0, 1.0, {"texts": (["the cat sat", "yes"], ["the cat", "yes"])})
    assert score(TEXTS, predictions) == pytest.approx(
        {"loss": 1.0, "exact_match": 0.5, "rougeL": (0.8 + 1.0) / 2}
    )


def test_perplexity_is_exp_of_the_mean_loss_and_inf_beyond_floats():
    assert score(["perplexity"], Predictions(loss_sum=6.0, count=3.0)) == {
        "loss": 2.0,
        "perplexity": math.exp(2.0),
    }
    assert score(["perplexity"], Predictions(loss_sum=1e6, count=1.0))["perplexity"] == math.inf


def test_nothing_to_score_is_nan():
    scores = score([*IDS, *TEXTS, "perplexity"], Predictions())
    assert len(scores) == 7
    assert all(math.isnan(value) for value in scores.values())


def test_only_loss_and_perplexity_are_better_when_smaller():
    assert [
        name for name in [*IDS, *TEXTS, "perplexity", "loss"] if not greater_is_better(name)
    ] == ["perplexity", "loss"]


def test_metrics_are_evaluate_metrics_that_need_no_hub():
    import evaluate

    assert isinstance(metric("accuracy"), evaluate.Metric)
    assert metric("accuracy") is metric("accuracy")
    assert metric("accuracy").compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}
    assert metric("rougeL").compute(predictions=["a b"], references=["a b"]) == {"rougeL": 1.0}


def test_scoring_a_client_is_fast():
    predictions = predictions_of([0, 1] * 50, [0, 1] * 50)
    score(["accuracy"], predictions)
    started = time.process_time()
    for _ in range(50):
        score(["accuracy"], predictions)
    assert (time.process_time() - started) / 50 < 0.01


def test_importing_the_metrics_does_not_import_evaluate():
    program = (
        "import sys, fedmerge_peft.tasks.metrics; "
        "sys.exit('evaluate' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_scores_beyond_one_are_no_fractions():
    found = [name for name in ("accuracy", "entity_f1", "perplexity", "mse", "pearson", "loss")
             if is_fraction(f"test_{name}")]  # fmt: skip
    assert found == ["accuracy", "entity_f1"]

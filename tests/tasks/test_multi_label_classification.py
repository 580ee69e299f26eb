"""Several labels for each text or image: their columns, their loss, and their metrics."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL.Image import fromarray
from sklearn.metrics import average_precision_score, f1_score

from fedmerge_peft import Recipe, federate
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks import Predictions
from fedmerge_peft.tasks.metrics import score
from task_bench import TaskBench, assert_same_step

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
    written = table_of(a=["1", "0", "1"], b=["False", "False", "True"])  # as in csv files
    for table in (flags, written):
        task = task_of("bert", table, name=NAME, labels=["a", "b"])
        assert task.labels == ["a", "b"]
        assert labels_of(task, table) == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"labels": [["a"], ["b", "b"]]}, {}, r"row 1 .*'labels' has a label twice: b; write"),
        ({"labels": [["a"], None]}, {}, r"row 1 .*'labels' is empty"),
        ({"labels": ["a", "b"]}, {}, r"'labels' has the type string, expected lists"),
        ({"labels": [[], []]}, {}, r"has no values to infer labels from"),
        ({"labels": [["a"], ["b", " "]]}, {}, r"row 1 .*'labels' has a list with an empty label"),
        ({"labels": [[0, 1], [1, 0]]}, {}, r"have 2 values, 0 or 1, so they seem to have one for"),
        ({"labels": [[0, 0, 1], [1, 0, 0]]}, {}, r"have 3 values, 0 or 1, so they seem to have"),
        ({"labels": [[0], [10**6]]}, {}, r"row 1 .*'labels' has the label 1000000, .* too large"),
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


def test_labels_in_lists_that_look_alike_are_warned_about(task_of, caplog):
    task_of("bert", table_of(labels=[["a", " a"], ["b"]]), name=NAME)
    assert "task.labels: labels that look alike are counted as different ones" in caplog.text


def test_an_unknown_label_is_refused_with_its_row(task_of):
    task = task_of("bert", table_of(labels=[["a"], ["b"]]), name=NAME)
    with pytest.raises(DataError, match=r"row 1 .*'c' is not a known label.*a, b"):
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


def images_of(**columns):
    count = len(next(iter(columns.values())))
    noise = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    pictures = Dataset.from_dict({"image": [fromarray(each) for each in noise], **columns})
    return pictures.cast_column("image", Image())


IMAGES = "multi-label-image-classification"


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_step_on_images_equals_one_of_transformers_trainer(tiny_models, tmp_path):
    table = images_of(labels=[["joy"], [], ["anger", "fear"], ["fear"]])
    lora = {"target_modules": ["q_proj", "v_proj"]}
    bench = TaskBench(tiny_models / "vit", table, {"name": IMAGES}, lora)
    row = bench.row()
    expected = bench.trained_by_transformers(
        bench.plain_peft(row, tmp_path / "adapter"),
        [{"row": place} for place in bench.rows],
        lambda rows: {
            name: tensor.double() if name == "labels" else tensor
            for name, tensor in bench.runtime.collate(
                np.array([each["row"] for each in rows])
            ).items()
        },
        tmp_path / "trainer",
    )
    assert_same_step(bench.trained(row), expected, bench.backbone.layout.state_dict(row))
    together, alone = bench.gradients(
        torch.stack([row, bench.row(2)]), [np.array([0, 1, 2]), np.array([3])]
    )
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_a_run_on_images_predicts_and_exports_sets_of_labels(tiny_models, tmp_path):
    sets = [["joy"], [], ["anger", "fear"], ["fear"]] * 4
    table = images_of(labels=sets, client=[f"client {n % 2}" for n in range(16)])
    recipe = Recipe.model_validate(
        {
            "name": "pictures",
            "rounds": 1,
            "task": {"name": IMAGES, "threshold": 0.4},
            "backbone": {"model": str(tiny_models / "vit")},
            "lora": {"r": 2, "target_modules": ["q_proj"]},
            "data": {
                "path": "memory",
                "test_fraction": 0.25,
                "partition": {"scheme": "natural", "by": "client"},
            },
            "training": {"learning_rate": 0.01, "steps": 1, "batch_size": 4, "device": "cpu"},
        }
    )
    run = federate(recipe, tmp_path / "run", data=table)
    first, second = (run.label_counts.loc[f"client {number}"] for number in (0, 1))
    assert first["joy"] + first["anger"] == run.clients["train"]["client 0"]
    assert first["anger"] == first["fear"] > 0  # an example counts for each of its labels
    assert second["joy"] == second["anger"] == 0 < second["fear"] < run.clients["train"]["client 1"]
    picture = table[0]["image"]
    (found,) = run.predict({"client 0": [picture]}, device="cpu")["client 0"]
    pipe = run.client("client 0").pipeline(device="cpu")
    every = {each["label"]: each["score"] for each in pipe(picture, top_k=None)}
    assert found["labels"] == sorted(name for name, score in every.items() if score >= 0.4)
    assert found["scores"] == pytest.approx([every[name] for name in found["labels"]], rel=1e-3)
    card = (run.save_adapter("client 0", tmp_path / "out") / "README.md").read_text()
    scope = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    assert scope["model"].config.problem_type == "multi_label_classification"
    pixels = scope["processor"]([picture], return_tensors="pt")
    with torch.no_grad():
        logits = scope["model"].eval()(**pixels).logits[0]
    scores = dict(zip(scope["labels"], logits.sigmoid().tolist(), strict=True))
    assert scores == pytest.approx(every, rel=1e-3)

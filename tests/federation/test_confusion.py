"""Confusion matrices are counts of the served models on the clients' test examples."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from fedmerge_peft import RunError, federate, resume
from fedmerge_peft.report.page import render
from fedmerge_peft.runs import documents
from fedmerge_peft.runs.confusion import client_confusion
from fedmerge_peft.runs.verify import verify
from fedmerge_peft.training.evaluation import confusion
from fedmerge_peft.util import checked
from report.made_runs import write
from task_bench import TaskBench
from tasks.made_examples import made


@pytest.fixture(scope="module")
def run(smoke, smoke_engine, tmp_path_factory):
    recipe = smoke("rounds=1", "baselines=[local]")
    return federate(recipe, tmp_path_factory.mktemp("runs") / "one", engine=smoke_engine)


def test_a_client_has_the_counts_of_its_own_adapter(run, smoke_engine):
    soup, weights = run.state()
    labels = range(len(run.task["labels"]))
    for row, client in enumerate(smoke_engine.clients):
        smoke_engine.backbone.load_row(soup.merge(weights[row]))
        true, inputs = smoke_engine.runtime.to_device(smoke_engine.runtime.collate(client.test))
        with torch.no_grad():
            found = smoke_engine.backbone.model.eval()(**inputs).logits.argmax(-1)
        counts = run.client(client.name).confusion()
        assert counts.to_numpy().tolist() == confusion_matrix(true, found, labels=labels).tolist()
        assert list(counts.index) == list(counts.columns) == run.task["labels"]


def test_baselines_have_their_own_and_accuracies_agree(run):
    for each in (run, run.baselines["local"]):
        for name, row in each.clients.iterrows():
            counts = each.client(name).confusion().to_numpy()
            assert counts.sum() == row["test"]
            assert np.trace(counts) / counts.sum() == pytest.approx(row["test_accuracy"])


def test_the_counts_belong_to_the_run(run):
    assert (run.path / "confusion.json").is_file()
    assert verify(run.path) > 0


def test_words_are_counted_without_padding_and_later_tokens(tiny_models):
    table, section = made("token-classification", 6)
    bench = TaskBench(tiny_models / "bert", table, section, {"target_modules": ["query"]})
    row = bench.row()
    bench.backbone.load_row(row)
    logits, labels = bench.logits()
    own = labels >= 0
    found = np.zeros((len(bench.task.labels),) * 2, dtype=int)
    for true, predicted, count in confusion(bench.runtime, row, bench.rows, 4):
        found[true, predicted] = count
    expected = confusion_matrix(
        labels[own], logits.argmax(-1)[own], labels=range(len(bench.task.labels))
    )
    assert found.tolist() == expected.tolist()


def test_a_resumed_run_counts_after_its_new_last_round(run, smoke_engine, tmp_path):
    import shutil

    shutil.copytree(run.path, tmp_path / "run")
    longer = resume(tmp_path / "run", ["rounds=2"], engine=smoke_engine)
    assert documents.read(longer.path / "confusion.json")["after_round"] == 2
    assert longer.client(longer.client_names[0]).confusion().to_numpy().sum() > 0


def test_there_are_none_of_an_earlier_round_that_is_served(run, tmp_path):
    import shutil

    shutil.copytree(run.path, tmp_path / "run")
    document = checked.read_document(tmp_path / "run" / "confusion.json")
    checked.write_document(tmp_path / "run" / "confusion.json", {**document, "after_round": 0})
    with pytest.raises(RunError, match="no confusion matrices after round 1"):
        type(run)(tmp_path / "run").client(run.client_names[0]).confusion()


def test_private_runs_do_not_count(smoke, smoke_engine, tmp_path):
    private = "privacy={mode: local, clip: 1.0, noise: 1.0}"
    recipe = smoke("rounds=1", private)
    hidden = federate(recipe, tmp_path / "run", engine=smoke_engine.with_recipe(recipe))
    assert not (hidden.path / "confusion.json").exists()


def made_run(folder, labels):
    """A run of two clients with counts of all labels; the first label is predicted too often."""
    names = ["north clinic", "south <clinic>"]
    run = write(
        folder, ["strategy.adapters=2"], names, np.array([[0.5, 0.6], [0.7, 0.8]]), "test_accuracy",
        labels=labels,
    )  # fmt: skip
    pairs = [[k, k, 5] for k in range(len(labels))] + [[k, 0, 1 + k] for k in range(1, len(labels))]
    document = {"after_round": 1, "labels": labels, "clients": dict.fromkeys(names, pairs)}
    checked.write_document(folder / "confusion.json", document)
    return run


def test_a_report_has_matrices_of_few_labels_and_pairs_of_many(tmp_path):
    few = render([made_run(tmp_path / "few", ["late", "lost", "<b>"])])
    assert few.count('<table class="matrix">') == 3
    assert "&lt;b&gt; as late (6), lost as late (4)" in few
    assert "30 of 40 test examples are labeled right" in few
    many = render([made_run(tmp_path / "many", [f"label {k}" for k in range(25)])])
    assert '<table class="matrix">' not in many
    assert "label 24 as label 0 (50), label 23 as label 0 (48)" in many


def test_classes_that_are_no_labels_are_refused(tmp_path):
    run = made_run(tmp_path / "run", ["late", "lost"])
    document = checked.read_document(run.path / "confusion.json")
    document["clients"]["north clinic"][0][1] = 2
    checked.write_document(run.path / "confusion.json", document)
    with pytest.raises(RunError, match=r"north clinic has a class that is not one of the 2 labels"):
        documents.read(run.path / "confusion.json")


def test_a_hundred_thousand_labels_need_no_matrix(tmp_path):
    run = made_run(tmp_path / "run", ["late", "lost"])
    labels = [f"label {k}" for k in range(100_000)]
    document = {"after_round": 1, "labels": labels, "clients": {"north clinic": [[99_999, 5, 3]]}}
    checked.write_document(run.path / "confusion.json", document)
    assert "label 99999 as label 5 (3)" in render([run])
    found = client_confusion(run, "north clinic", 1)
    assert found.loc["label 99999", "label 5"] == 3
    assert found.shape == (2, 2)

"""Newcomers of runs with label priors and restricted logits."""

import pytest
import torch

from fedmerge_peft import federate, personalize
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import RunError
from fedmerge_peft.serving.newcomer_data import newcomer_prior
from fedmerge_peft.strategies.label_counts import LabelPriors
from fedmerge_peft.strategies.label_prior import bias_columns

COUNTS = [[30, 1, 0], [1, 30, 0], [0, 1, 30], [15, 15, 0], [30, 0, 2], [0, 31, 1]]


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    recipe = smoke(
        "strategy={name: fedmerge, adapters: 2, groups: 2, warm_rounds: 1, own_head: false}",
        "rounds=2",
        "training.logits=restricted",
        "serving.label_prior=true",
    )
    engine = LocalEngine.from_recipe(recipe)
    classes = len(engine.task.labels)
    table = [(row + [0] * classes)[:classes] for row in COUNTS]
    engine.label_counts = lambda: table
    return federate(recipe, tmp_path_factory.mktemp("run") / "run", engine=engine)


def test_a_newcomers_prior_is_that_of_its_examples_in_the_run(run):
    layout, known = run.soup.layout, torch.tensor(run.label_counts.to_numpy())
    counts = known[:1].flip(1)
    shifts = LabelPriors.fit(known).shifts(counts, balanced=False)
    prior = newcomer_prior(run, layout, counts.tolist())
    columns = bias_columns(layout, known.shape[1])
    assert torch.equal(prior[columns], shifts[0])
    assert int((prior != 0).sum()) <= len(columns)
    assert shifts.abs().max() > 0.5


def test_a_newcomers_adapter_has_its_prior(run, tmp_path):
    labels = run.task["labels"]
    data = tmp_path / "new.csv"
    rows = [f"my order number {number} is late,{labels[number % 2]}" for number in range(20)]
    task = run.recipe.task
    data.write_text("\n".join([f"{task.text},{task.label}", *rows]) + "\n")
    found = personalize(run, data, local=False)
    expected = newcomer_prior(
        run,
        run.soup.layout,
        [[7 if label < 2 else 0 for label in range(len(labels))]],
    )
    assert found.examples == {"train": 14, "test": 6}
    torch.testing.assert_close(found.row, found.soup.merge(found.weights) + found.prior)
    difference = found.prior - expected
    assert difference.abs().max() < 1  # the draw of the test examples changes the counts by a few
    assert found.prior.abs().max() > 0.5


def test_without_the_clients_labels_there_is_no_prior(run, monkeypatch):
    monkeypatch.setattr(type(run), "label_counts", None)
    with pytest.raises(RunError, match=r"labels\.json is missing"):
        newcomer_prior(run, run.soup.layout, [[1, 2, 3]])

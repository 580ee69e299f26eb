"""Training with restricted and adjusted logits."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from equality import assert_near
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.training.label_logits import client_offset, label_offset
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from training.stack_bench import Bench


def test_offsets_follow_from_the_counts():
    counts = torch.tensor([6, 0, 2])
    assert label_offset("plain", counts) is None
    assert label_offset("restricted", counts).tolist() == [0, -math.inf, 0]
    assert label_offset("adjusted", counts).exp().tolist() == pytest.approx([0.75, 0, 0.25])


def test_offsets_count_the_clients_own_rows():
    labels = [torch.tensor(label) for label in (0, 1, 2, 2)]
    examples = Examples({"labels": labels})
    assert client_offset("restricted", examples, np.array([0, 2]), 3).tolist() == [0, -math.inf, 0]
    with pytest.raises(RecipeError, match="needs a task with one label per example"):
        client_offset("restricted", examples, np.array([0]), 0)


@pytest.fixture
def bench(tiny_models, table_and_task):
    return Bench(tiny_models, table_and_task, optimizer="sgd", weight_decay=0.0)


def job(bench, logits, rows=(0, 1, 3, 4), seed=1):
    """A job on examples of the first two of three classes."""
    return Job(Train(bench.row(seed), logits=logits), np.array(rows), 100)


@pytest.mark.parametrize("logits", ["restricted", "adjusted"])
def test_scores_of_labels_without_examples_do_not_change(bench, logits):
    layout = bench.backbone.layout
    for kind, changes in ((logits, False), ("plain", True)):
        (trained,) = bench.alone([job(bench, kind)])
        step = layout.state_dict(trained.row - bench.row(1))
        weight = step[layout.classifier.key]
        assert weight[:2].abs().min() > 0
        assert bool(weight[2].any()) is changes
        assert bool(step[layout.classifier_bias.key][2]) is changes


@pytest.mark.parametrize("logits", ["restricted", "adjusted"])
def test_the_loss_is_the_cross_entropy_of_the_shifted_logits(bench, logits):
    rows = np.array([0, 1, 3])  # labels 0, 1, 0
    bench.recipe = bench.recipe.model_copy(
        update={"training": bench.recipe.training.model_copy(update={"batch_size": 3, "steps": 1})}
    )
    (trained,) = bench.alone([job(bench, logits, rows)])
    bench.backbone.load_row(bench.row(1))
    bench.backbone.eval()
    labels, inputs = bench.runtime.to_device(bench.runtime.collate(rows))
    with torch.no_grad():
        own = bench.backbone.model(**inputs).logits[:, :2]
    if logits == "adjusted":
        own = own + torch.tensor([2 / 3, 1 / 3]).log()
    assert trained.loss == pytest.approx(float(functional.cross_entropy(own, labels)), rel=1e-5)


def test_one_label_of_ones_own_leaves_nothing_to_learn(bench):
    (trained,) = bench.alone([job(bench, "restricted", (0, 3, 6))])
    assert trained.loss == 0
    assert torch.equal(trained.row, bench.row(1))


def test_clients_with_different_logits_share_a_pass(bench):
    jobs = [
        job(bench, "restricted", seed=1),
        job(bench, "adjusted", (0, 2, 5, 8), seed=2),
        job(bench, None, (1, 2, 3, 4), seed=3),
    ]
    for together, alone in zip(bench.together(jobs), bench.alone(jobs), strict=True):
        torch.testing.assert_close(together.row, alone.row)
        assert together.loss == pytest.approx(alone.loss, rel=1e-5)


def test_jobs_use_the_recipes_logits_unless_they_have_their_own(bench):
    training = bench.recipe.training.model_copy(update={"logits": "restricted"})
    (of_recipe,) = train(bench.runtime, training, [job(bench, None)])
    (own,) = train(bench.runtime, training, [job(bench, "plain")])
    (restricted,), (plain,) = (
        bench.alone([job(bench, logits)]) for logits in ("restricted", "plain")
    )
    assert torch.equal(of_recipe.row, restricted.row)
    assert torch.equal(own.row, plain.row)
    assert_near(of_recipe.row, restricted.row, 0)

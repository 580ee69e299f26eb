"""Class weights and the focal loss: steps equal plain torch, and clients do not mix."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional
from transformers import Trainer

from fedmerge_peft import Recipe
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.tasks.imbalance import focal
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from task_bench import TaskBench, assert_same_step

KINDS = ["bert", "vit", "bert-token-classification", "bert-multi-label-classification"]
GIVEN = {"token-classification": {"B-PER": 3.0}, "multi-label-classification": {"joy": 3.0}}
COUNT = 8


@pytest.fixture
def make_bench(tiny_models, table_and_task):
    """``make_bench("bert", class_weights="balanced")``: a task on a tiny model."""

    def make(kind, **options):
        table, task = table_and_task(kind, COUNT)
        model = kind.partition("-")[0]
        targets = ["q_proj", "v_proj"] if model == "vit" else ["query", "value"]
        return TaskBench(tiny_models / model, table, task | options, {"target_modules": targets})

    return make


def torch_loss(kind, logits, labels, weights, gamma):
    """The mean loss as PyTorch and the paper define it, with the weights of classes."""
    if kind.endswith("multi-label-classification"):
        p = logits.sigmoid()
        if not gamma:
            return functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
        yes = weights * labels * (1 - p) ** gamma * p.log()
        return -(yes + (1 - labels) * p**gamma * (1 - p).log()).mean()
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if not gamma:
        return functional.cross_entropy(logits, labels, weight=weights, ignore_index=-100)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    p = logits.softmax(-1)[torch.arange(len(labels)), labels]
    return -(weights[labels] * (1 - p) ** gamma * p.log()).sum() / weights[labels].sum()


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_one_of_a_trainer_with_a_weighted_loss(make_bench, kind, gamma, tmp_path):
    given = GIVEN.get(kind.partition("-")[2], {"1": 3.0})
    bench = make_bench(kind, class_weights=given, focal_gamma=gamma)
    weights = torch.tensor([given.get(name, 1.0) for name in bench.task.labels])

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, **_):
            labels = inputs.pop("labels").to(torch.get_default_dtype())
            if not kind.endswith("multi-label-classification"):
                labels = labels.long()
            return torch_loss(kind, model(**inputs).logits, labels, weights, gamma)

    row = bench.row()
    expected = bench.trained_by_transformers(
        bench.plain_peft(row, tmp_path / "adapter"),
        [{"row": place} for place in bench.rows],
        lambda rows: bench.runtime.collate(np.array([each["row"] for each in rows])),
        tmp_path / "trainer",
        Weighted,
    )
    assert_same_step(bench.trained(row), expected, bench.backbone.layout.state_dict(row))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_clients_share_a_pass_with_their_own_balanced_weights(make_bench, kind):
    bench = make_bench(kind, class_weights="balanced", focal_gamma=0.5)
    rows = [np.array([0, 3, 4, 6]), np.array([1, 2]), np.array([5, 6, 7])]
    weights = [bench.task.class_weights(bench.runtime.examples, own) for own in rows]
    assert not torch.equal(weights[0], weights[1])
    jobs = [Job(Train(bench.row(seed)), own, 0) for seed, own in enumerate(rows)]
    together = train(bench.runtime, bench.recipe.training, jobs)
    for own, job in zip(together, jobs, strict=True):
        (alone,) = train(bench.runtime, bench.recipe.training, [job])
        moved = (alone.row - job.train.row).norm()
        assert (own.row - alone.row).norm() <= 1e-10 * moved
        assert own.loss == pytest.approx(alone.loss, rel=1e-10)


def test_balanced_weights_are_those_of_scikit_learn(make_bench):
    bench = make_bench("bert", class_weights="balanced")
    rows = np.array([0, 3, 6, 1, 4])  # labels 0, 0, 0, 1, 1; none has 2
    found = bench.task.class_weights(bench.runtime.examples, rows)
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=[0, 0, 0, 1, 1])
    assert found.tolist() == pytest.approx([*expected, 1.0])


def test_balanced_labels_have_the_same_weight_with_and_without(make_bench):
    bench = make_bench("bert-multi-label-classification", class_weights="balanced")
    found = bench.task.class_weights(bench.runtime.examples, np.array([0, 1, 2, 3]))
    assert dict(zip(bench.task.labels, found.tolist(), strict=True)) == pytest.approx(
        {"anger": 3.0, "fear": 1.0, "joy": 3.0}
    )
    none_or_all = bench.task.class_weights(bench.runtime.examples, np.array([2]))
    assert none_or_all.tolist() == [1.0, 1.0, 1.0]


def test_scores_have_the_plain_loss(make_bench):
    plain, weighted = (
        make_bench("bert", **options)
        for options in ({}, {"class_weights": "balanced", "focal_gamma": 2.0})
    )
    row = plain.row()
    assert plain.scores(row) == weighted.scores(row)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_focal_loss_of_certain_examples_has_no_gradient(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]], requires_grad=True)
    losses = functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    focal(losses, gamma).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert float(logits.grad[1, 0]) < 0


def test_weights_of_unknown_labels_are_refused(make_bench):
    with pytest.raises(RecipeError, match=r"task.class_weights: '3' is not a known label.*0, 1, 2"):
        make_bench("bert", class_weights={"3": 2.0})


def test_labels_in_yaml_may_be_numbers():
    task = "task={name: sequence-classification, class_weights: {0: 2.0, 1: 1.0}}"
    assert Recipe.load("smoke", [task]).task.class_weights == {"0": 2.0, "1": 1.0}


@pytest.mark.parametrize("value", ["{a: 0}", "{a: -1}", "{}", "equal"])
def test_unsuitable_weights_are_refused(value):
    with pytest.raises(RecipeError, match="class_weights"):
        Recipe.load("smoke", [f"task.class_weights={value}"])

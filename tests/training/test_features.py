"""Features of the last layer: alignment in the gradient, and statistics by class."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from equality import assert_near
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.training.features import class_statistics, penalties
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Alignment, Train
from training.stack_bench import ROWS, Bench


@pytest.fixture
def make_bench(tiny_models, table_and_task):
    return partial(Bench, tiny_models, table_and_task)


def alignment(width, strength, seed):
    """Centroids of three classes; the last class has none."""
    centroids = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    centroids[2] = torch.nan
    return Alignment(centroids, strength)


def pooled(bench, rows):
    """Labels, features and logits of BERT, without hooks."""
    labels, inputs = bench.runtime.to_device(bench.runtime.collate(rows))
    model = bench.backbone.model.get_base_model()
    features = model.bert(**inputs).pooler_output
    return labels, features, model.classifier(features)


def plain_gradient(bench, row, rows, alignment):
    """The gradient of mean cross-entropy + λ · mean (1/d) ‖f − c_y‖², by autograd alone."""
    bench.backbone.load_row(row)
    for parameter in bench.backbone.trainable:
        parameter.grad.zero_()
    labels, features, logits = pooled(bench, rows)
    loss = functional.cross_entropy(logits, labels)
    total = loss
    for feature, label in zip(features, labels.tolist(), strict=True):
        if alignment is not None and label < 2:
            distance = (feature - alignment.centroids[label]).square().mean()
            total = total + alignment.strength * distance / len(labels)
    total.backward()
    return loss.detach(), bench.backbone.flat.grad.clone()


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_the_gradient_of_one_adapter_and_of_several_has_the_penalty(make_bench):
    bench = make_bench()
    width = bench.backbone.layout.classifier.shape[1]
    cases = [
        (bench.row(0), ROWS[:6], alignment(width, 0.7, 1)),
        (bench.row(1), ROWS[4:12], None),
        (bench.row(2), ROWS[9:14], alignment(width, 2.0, 2)),
    ]
    expected = [plain_gradient(bench, *case) for case in cases]
    for (row, rows, aligned), (loss, gradient) in zip(cases, expected, strict=True):
        slot = AdapterSlot(bench.backbone, row)
        with slot.applied():  # in two micro-batches
            found = accumulate(bench.runtime, slot, [[rows[:2], rows[2:]]], None, [aligned])
        assert_near(found[0], loss)
        assert_near(slot.gradient[0], gradient)
    stack = AdapterStack(bench.backbone, torch.stack([row for row, _, _ in cases]))
    with stack.applied():
        steps = [[rows] for _, rows, _ in cases]
        found = accumulate(bench.runtime, stack, steps, None, [case[2] for case in cases])
    for k, (loss, gradient) in enumerate(expected):
        assert_near(found[k], loss)
        assert_near(stack.gradient[k], gradient)


def test_a_strong_alignment_brings_features_to_their_centroids(make_bench):
    bench = make_bench(epochs=20, learning_rate=0.02)
    width = bench.backbone.layout.classifier.shape[1]
    centroids = 0.3 * torch.sign(torch.randn(3, width, generator=torch.Generator().manual_seed(3)))
    row, rows = bench.row(0), ROWS[:9]

    def distance(aligned):
        (done,) = train(
            bench.runtime, bench.recipe.training, [Job(Train(row, alignment=aligned), rows, 1)]
        )
        bench.backbone.load_row(done.row)
        labels, features, _ = pooled(bench, rows)
        return float(penalties(Alignment(centroids, 1.0), features, labels).mean().detach())

    assert distance(Alignment(centroids, 10.0)) < 0.5 * distance(None)


def test_the_statistics_are_sums_over_the_examples_of_a_class(make_bench):
    bench = make_bench()
    row, rows = bench.row(0), ROWS[[8, 1, 2, 4, 5, 10]]  # labels 2, 1, 2, 1, 2, 1
    found = class_statistics(bench.runtime, row, rows, 4)
    bench.backbone.load_row(row)
    with torch.no_grad():
        labels, features, _ = pooled(bench, rows)
    assert found[:, 0].tolist() == [0, 3, 3]
    assert not found[0].any()
    for label in (1, 2):
        own = features[labels == label]
        torch.testing.assert_close(found[label, 1], own.square().sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[label, 2:], own.sum(0), rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_all_tokens_has_no_features(make_bench):
    bench = make_bench("llama-classifier")
    with pytest.raises(RecipeError, match="one feature vector per example"):
        class_statistics(bench.runtime, bench.row(0), np.arange(3), 4)

"""Scores and losses of adapters and of mixtures."""

import numpy as np
import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft import RecipeError
from fedmerge_peft.training.evaluation import evaluate, evaluate_parts, example_losses
from fedmerge_peft.training.labeled_head import labeled_head
from fedmerge_peft.training.plan import Mixture
from training.bench import Bench


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_evaluation_does_not_depend_on_its_batch_size(tiny_models):
    bench = Bench(tiny_models)
    found = [bench.evaluate(bench.row, size) for size in (1, 3, 10)]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=tolerance(torch.float64))
    assert found[0]["loss"] == pytest.approx(found[2]["loss"], rel=tolerance(torch.float64))
    assert found[0]["accuracy"] == found[1]["accuracy"] == found[2]["accuracy"]


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_the_losses_of_examples_add_up_to_the_evaluations(tiny_models):
    bench = Bench(tiny_models)
    found = [
        example_losses(bench.runtime, bench.row, order, 3)
        for order in (np.arange(10), np.arange(10)[::-1])
    ]
    assert float(found[0].mean()) == pytest.approx(
        bench.evaluate(bench.row)["loss"], rel=tolerance(torch.float64)
    )
    assert_near(found[0], found[1].flip(0))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("mixed", [False, True], ids=["adapter", "mixture"])
def test_parts_that_share_batches_have_the_scores_of_each_alone(tiny_models, kind, mixed):
    bench = Bench(tiny_models, kind)
    bench.runtime.head = labeled_head(bench.runtime, np.arange(10)) if kind == "gpt2" else None
    rows = torch.stack([bench.row, bench.backbone.fresh_row(2)])
    served = Mixture(rows, torch.tensor([0.3, 0.7])) if mixed else bench.row
    parts = [np.array([7, 1, 4]), np.array([0]), np.array([9, 2, 3, 5, 8])]
    alone = [evaluate(bench.runtime, served, part, 4) for part in parts]
    passes = []
    handle = bench.backbone.model.register_forward_hook(lambda *_: passes.append(1))
    found = evaluate_parts(bench.runtime, served, parts, 4)
    handle.remove()
    assert len(passes) == 3 * (1 + mixed)  # batches of 4, 4 and 1
    assert len({scores["loss"] for scores in found}) == 3
    for one, other in zip(found, alone, strict=True):
        assert one == pytest.approx(other, rel=tolerance(torch.float64))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_mixture_predicts_with_the_mean_of_probabilities(tiny_models):
    bench = Bench(tiny_models)
    rows, weights = (
        torch.stack([bench.row, bench.train().row, bench.backbone.fresh_row(2)]),
        torch.tensor([0.2, 0.7, 0.1]),
    )
    mixed = sum(
        weight * bench.probabilities(row)
        for weight, row in zip(weights.double(), rows, strict=True)
    )
    labels = torch.arange(10) % 3
    found = bench.evaluate(Mixture(rows, weights))
    assert found["loss"] == pytest.approx(
        float(-mixed[torch.arange(10), labels].log().mean()), rel=tolerance(torch.float64)
    )
    assert found["accuracy"] == pytest.approx(float((mixed.argmax(1) == labels).double().mean()))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_mixture_of_one_is_the_adapter_itself(tiny_models):
    bench = Bench(tiny_models)
    alone = bench.evaluate(bench.row)
    other = bench.backbone.fresh_row(2)
    for mixture in (
        Mixture(bench.row[None], torch.ones(1)),
        Mixture(torch.stack([other, bench.row]), torch.tensor([0.0, 1.0])),
    ):
        assert bench.evaluate(mixture) == pytest.approx(alone, rel=tolerance(torch.float64))


@pytest.mark.equality
def test_each_part_of_a_mixture_predicts_by_itself_under_autocast(tiny_models):
    bench = Bench(tiny_models, mixed_precision="bf16")
    mixture = Mixture(
        torch.stack([bench.backbone.fresh_row(2), bench.row]), torch.tensor([0.0, 1.0])
    )
    assert bench.evaluate(mixture) == pytest.approx(
        bench.evaluate(bench.row), rel=tolerance(torch.float32)
    )


def test_a_mixture_generates_no_text(tiny_models):
    bench = Bench(tiny_models, "gpt2")
    bench.task.generates = True
    with pytest.raises(
        RecipeError, match=r"task\.metrics: a mixture of models cannot generate text"
    ):
        bench.evaluate(Mixture(bench.row[None], torch.ones(1)))

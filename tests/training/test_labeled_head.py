"""Logits at labeled positions only: results equal those with all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from equality import assert_near, tolerance
from fedmerge_peft.tasks.text_generation import likely_tokens, token_losses
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.labeled_head import labeled_head
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Mixture, Train
from training.prefix_bench import ROWS


def runtimes(bench):
    """A runtime with the head at labeled positions, and a plain one on the same model."""
    short, plain = bench.runtime, bench.runtime
    short.head = labeled_head(short, ROWS)
    assert short.head is not None
    return short, plain


def head_of(bench):
    return bench.backbone.model.get_base_model().get_output_embeddings()


def results(runtime, bench):
    rows = torch.stack([bench.row, 1.1 * bench.row])
    jobs = [Job(Train(row), ROWS[4 * k : 4 * k + 6], k) for k, row in enumerate(rows)]
    training = bench.recipe.training
    alone, together = train(runtime, training, jobs[:1]), train(runtime, training, jobs)
    served = Mixture(rows, torch.tensor([0.3, 0.7]))
    scores = [evaluate(runtime, each, ROWS, 5) for each in (bench.row, served)]
    trained = [each.row for each in (*alone, *together)]
    return trained, example_losses(runtime, bench.row, ROWS, 5), scores


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_training_and_evaluation_equal_the_plain_way(make_bench, kind):
    bench = make_bench(kind)
    short, plain = (results(runtime, bench) for runtime in runtimes(bench))
    for one, other in zip(short[0], plain[0], strict=True):
        assert one.dtype == torch.float64
        assert_near(one, other, bench.row)
    assert_near(short[1], plain[1])
    for one, other in zip(short[2], plain[2], strict=True):
        assert set(one) >= {"loss", "accuracy"}
        assert one == pytest.approx(other, rel=tolerance(torch.float64))


def test_the_head_computes_labeled_positions_only(make_bench):
    bench = make_bench("gpt2", cached=False)
    short, plain = runtimes(bench)
    sizes = []
    handle = head_of(bench).register_forward_hook(
        lambda _, __, logits: sizes.append(logits[..., 0].numel())
    )
    for runtime in (short, plain):
        evaluate(runtime, bench.row, ROWS, 12)
    handle.remove()
    labeled = sum(int((labels != -100).sum()) for labels in bench.examples.columns["labels"])
    assert sizes == [labeled, 12 * int(bench.examples.lengths.max())]
    assert labeled < sizes[1] / 2


def adapt_it(bench):
    head_of(bench).weight.requires_grad_(True)


def train_its_bias(bench):
    head = head_of(bench)
    head.bias = nn.Parameter(torch.zeros(head.out_features))


def mix_positions(bench):
    head_of(bench).register_forward_hook(lambda _, __, logits: logits - logits.mean(1, True))


def fail_at_other_lengths(bench):
    lengths = {}
    model = bench.backbone.model.get_base_model()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.update(now=kwargs["input_ids"].shape), with_kwargs=True
    )

    def check(_, __, logits):
        if logits.shape[:2] != lengths["now"]:
            raise ValueError("unexpected length")

    head_of(bench).register_forward_hook(check)


@pytest.mark.parametrize("alter", [adapt_it, train_its_bias, mix_positions, fail_at_other_lengths])
def test_models_that_need_all_positions_are_detected(make_bench, alter):
    bench = make_bench("gpt2", cached=False)
    alter(bench)
    assert labeled_head(bench.runtime, ROWS) is None


@pytest.mark.parametrize("kind", ["bert", "llama-classifier"])
def test_classifiers_have_no_such_head(make_bench, kind):
    assert labeled_head(make_bench(kind, cached=False).runtime, ROWS) is None


def test_an_adapted_head_computes_all_positions(make_bench):
    lora = {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": None}
    bench = make_bench("llama", cached=False, lora=lora)
    assert not isinstance(head_of(bench), nn.Linear)
    assert labeled_head(bench.runtime, ROWS) is None


def test_losses_and_gradients_equal_those_of_a_cross_entropy_that_ignores_the_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=generator).requires_grad_()
    targets = torch.tensor([[1, 2, -100, -100], [-100, 3, 4, 5], [-100, 1, 1, 6]])
    terms = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    (expected,) = torch.autograd.grad(terms.sum(), logits)
    for form in (logits, logits[targets >= 0]):
        sums, counts = token_losses(form, targets)
        assert torch.equal(sums, terms.view(3, 4).sum(dim=1))
        assert counts.tolist() == [2, 3, 3]
        (found,) = torch.autograd.grad(sums.sum(), logits, retain_graph=True)
        assert torch.equal(found, expected)
        predicted, labels = likely_tokens(form, targets)["tokens"]
        assert predicted == logits.argmax(dim=-1)[targets >= 0].tolist()
        assert labels == [1, 2, 3, 4, 5, 1, 1, 6]

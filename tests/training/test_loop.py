"""Training one client equals plain torch on separate tensors."""

import numpy as np
import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.optimization import count_steps
from fedmerge_peft.training.plan import Train
from training.bench import Bench


def plain_step(bench, optimizer, batches, sent=None):
    """One optimizer step on the model's separate tensors, in plain torch."""
    parameters = [p for p in bench.backbone.model.parameters() if p.requires_grad]
    sums, counts = [], []
    for batch in batches:
        labels = batch["labels"]
        logits = bench.backbone.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        summed, count = bench.task.losses(logits, labels)
        sums.append(summed.sum())
        counts.append(count.sum())
    loss = sum(sums) / sum(counts)
    if sent is not None:
        loss = loss + bench.recipe.training.proximal * sum(
            (p - s).square().sum()
            for p, s in zip(
                parameters, list(bench.backbone.layout.state_dict(sent).values()), strict=True
            )
        )
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient)
    optimizer.step()
    return float(loss.detach())


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"proximal": 0.5}, {"gradient_accumulation": 3}], ids=str
)
def test_one_full_batch_step_equals_a_plain_optimizer_on_separate_tensors(
    tiny_models, optimizer, options
):
    """Three steps on all examples at once, so that their order does not matter."""
    accumulation = options.get("gradient_accumulation", 1)
    bench = Bench(
        tiny_models,
        optimizer=optimizer,
        steps=3,
        **{**options, "batch_size": 10 if accumulation == 1 else 4},
    )
    trained = bench.train()

    bench.backbone.load_row(bench.row)
    parameters = [p for p in bench.backbone.model.parameters() if p.requires_grad]
    decay = options.get("weight_decay", 0.0)
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    plain = kind(parameters, lr=0.01, weight_decay=decay)
    everything = [bench.task.collate(bench.examples, np.arange(10))]
    for _ in range(3):
        plain_step(bench, plain, everything, bench.row if "proximal" in options else None)
    assert_near(trained.row, bench.backbone.row(), bench.row)
    assert trained.steps == 3
    assert not torch.allclose(trained.row, bench.row, atol=1e-3)


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_accumulated_gradients_weigh_every_labelled_token_equally(tiny_models):
    """Completions have 1 to 5 tokens, so a mean of micro-batch means is not the mean of all."""
    bench = Bench(tiny_models, "gpt2", optimizer="sgd", steps=1, batch_size=10)
    whole = bench.train()
    parts = Bench(
        tiny_models, "gpt2", optimizer="sgd", steps=1, batch_size=2, gradient_accumulation=5
    ).train()
    assert_near(parts.row, whole.row, bench.row)
    assert parts.loss == pytest.approx(whole.loss, rel=tolerance(torch.float64))


def test_clipping_bounds_the_whole_gradient(tiny_models):
    free = Bench(tiny_models, optimizer="sgd", steps=1, learning_rate=1.0)
    clipped = Bench(tiny_models, optimizer="sgd", steps=1, learning_rate=1.0, max_grad_norm=1e-3)
    assert float((free.train().row - free.row).norm()) > 1e-2
    assert float((clipped.train().row - clipped.row).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_proximal_term_keeps_the_adapter_near_the_sent_one(tiny_models):
    free, held = (
        Bench(tiny_models, epochs=20, optimizer="sgd", learning_rate=0.1, proximal=mu)
        for mu in (0.0, 1.0)
    )
    assert float((held.train().row - held.row).norm()) < 0.5 * float(
        (free.train().row - free.row).norm()
    )


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_plans_proximal_term_and_anchor_replace_the_recipes(tiny_models):
    """One SGD step: θ ← θ − η (∇ℓ + 2 μ (θ − anchor))."""
    bench = Bench(tiny_models, optimizer="sgd", steps=1, batch_size=10)
    anchor = bench.backbone.fresh_row(7)
    plain, held = bench.train(), bench.train(proximal=0.5, anchor=anchor)
    assert_near(held.row, plain.row - 0.01 * (bench.row - anchor), bench.row)
    assert held.loss == pytest.approx(plain.loss, rel=tolerance(torch.float64))
    recipes = Bench(tiny_models, optimizer="sgd", steps=3, batch_size=10, proximal=0.5)
    theirs = Bench(tiny_models, optimizer="sgd", steps=3, batch_size=10)
    assert torch.equal(recipes.train().row, theirs.train(proximal=0.5).row)
    assert torch.equal(recipes.train(proximal=0.0).row, theirs.train().row)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.3}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.3}],
    ids=str,
)
def test_only_the_columns_of_a_phase_move_in_it(tiny_models, options):
    bench = Bench(tiny_models, epochs=2, **options)
    head = torch.zeros(len(bench.row), dtype=torch.bool)
    head[bench.backbone.layout.columns("head")] = True
    alone = bench.train(phases=(head,))
    assert torch.equal(alone.row[~head], bench.row[~head])
    assert not torch.allclose(alone.row[head], bench.row[head], atol=1e-4)
    both = bench.train(phases=(head, ~head))
    assert torch.equal(both.row[head], alone.row[head])
    assert not torch.allclose(both.row[~head], bench.row[~head], atol=1e-4)
    assert both.steps == 2 * alone.steps


def test_a_phase_of_all_columns_is_plain_training_and_each_phase_has_its_own_order(tiny_models):
    bench = Bench(tiny_models)
    everything = torch.ones(len(bench.row), dtype=torch.bool)
    assert torch.equal(bench.train(phases=(everything,)).row, bench.train().row)
    twice = bench.train(phases=(None, None)).row
    job = Job(Train(bench.train().row), np.arange(10), 3)
    (again,) = train(bench.runtime, bench.recipe.training, [job])
    assert not torch.equal(twice, again.row)


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_example_weights_multiply_each_examples_loss(tiny_models):
    """One SGD step on Σ w_i ℓ_i / n, recomputed by autograd, with weights by index."""
    bench = Bench(tiny_models, optimizer="sgd", steps=1, batch_size=10, learning_rate=1.0)
    indices = np.array([7, 2, 5, 0])
    weights = torch.tensor([0.3, 0.0, 1.0, 2.0])
    trained = bench.train(indices, example_weights=weights)
    bench.backbone.load_row(bench.row)
    parameters = [p for p in bench.backbone.model.parameters() if p.requires_grad]
    batch = bench.task.collate(bench.examples, indices)
    logits = bench.backbone.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    loss = (weights * bench.task.losses(logits, batch["labels"])[0]).sum() / 4
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    assert_near(trained.row, bench.row - gradient, bench.row)
    assert trained.loss == pytest.approx(float(loss.detach()), rel=tolerance(torch.float64))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_an_example_of_weight_zero_is_absent_from_the_gradient(tiny_models):
    bench = Bench(tiny_models, optimizer="sgd", steps=1, batch_size=10, learning_rate=1.0)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    among = bench.train(np.array([1, 4, 8, 9]), example_weights=weights).row - bench.row
    without = bench.train(np.array([1, 4, 8])).row - bench.row
    assert_near(4 * among, 3 * without)
    ones = bench.train(example_weights=torch.ones(10))
    assert torch.equal(ones.row, bench.train().row)


@pytest.mark.equality
def test_same_seed_same_bits_and_another_seed_another_order(tiny_models):
    bench = Bench(tiny_models)
    first, again, other = bench.train(seed=3), bench.train(seed=3), bench.train(seed=4)
    assert torch.equal(first.row, again.row)
    assert not torch.equal(first.row, other.row)


def test_training_does_not_change_the_callers_random_numbers(tiny_models):
    bench = Bench(tiny_models)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bench.train()
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupted_client_does_not_affect_the_next(tiny_models, monkeypatch):
    bench = Bench(tiny_models)
    expected = bench.train()
    backward = bench.accelerator.backward

    def interrupted(loss):
        backward(loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.accelerator, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.train()
    monkeypatch.undo()
    assert torch.equal(bench.train().row, expected.row)


def test_training_lowers_the_loss(tiny_models):
    bench = Bench(tiny_models, epochs=15)
    trained = bench.train()
    before, after = bench.evaluate(bench.row), bench.evaluate(trained.row)
    assert after["loss"] < 0.7 * before["loss"]
    assert set(after) == {"loss", "accuracy"}


def test_bf16_autocast_trains_and_keeps_float32_adapters(tiny_models):
    bench = Bench(tiny_models, mixed_precision="bf16", epochs=3)
    trained = bench.train()
    assert trained.row.dtype == torch.float32
    assert trained.row.isfinite().all()
    full = Bench(tiny_models, mixed_precision="no", epochs=3).train()
    assert not torch.equal(trained.row, full.row)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 2}, 6),
        ({"steps": 5}, 5),
        ({"epochs": 2, "gradient_accumulation": 2}, 4),
        ({"batch_size": 100}, 1),
    ],
    ids=str,
)
def test_steps_follow_from_epochs_batches_and_accumulation(options, steps):
    assert count_steps(10, TrainingRecipe(**{"batch_size": 4, "epochs": 1, **options})) == steps


def test_warmup_and_decay_follow_the_schedule(tiny_models):
    from fedmerge_peft.training.optimization import make_optimizer, make_schedule

    training = TrainingRecipe(schedule="linear", warmup=0.2, learning_rate=1.0)
    optimizer = make_optimizer(torch.nn.Parameter(torch.zeros(1)), training)
    schedule = make_schedule(optimizer, training, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])

"""Training one client, held against the plain way of doing the same."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from fedmerge_peft.training.reference import count_steps, train

from equality import assert_near, tolerance
from fedmerge_peft import DeviceError, Recipe, RecipeError
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import choose_device, choose_precision, make_accelerator
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.plan import Mixture, Train

WORDS = ["parcel", "refund", "password", "laptop", "invoice", "badge", "heating"]


class Bench:
    """One client on a tiny BERT without dropout, so that steps can be recomputed."""

    def __init__(self, folder, kind="bert", **training):
        count = 10
        if kind == "bert":
            self.table = Dataset.from_dict(
                {
                    "text": [
                        f"the {WORDS[n % 7]} {'is late ' * (n % 4)}again" for n in range(count)
                    ],
                    "label": [n % 3 for n in range(count)],
                }
            )
            task = {"name": "sequence-classification"}
        else:
            self.table = Dataset.from_dict(
                {
                    "prompt": [f"say {WORDS[n % 7]}" for n in range(count)],
                    "completion": [" yes" * (1 + n % 5) for n in range(count)],
                }
            )
            task = {"name": "causal-lm"}
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": str(folder / kind)},
                "lora": {
                    "r": 2,
                    "target_modules": ["query", "value"] if kind == "bert" else ["c_attn"],
                },
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {
                    "batch_size": 4,
                    "learning_rate": 0.01,
                    "max_grad_norm": None,
                    **training,
                },
            }
        )
        self.accelerator = make_accelerator(self.recipe.training)
        self.task = make_task(self.recipe, self.table, str(folder / kind))
        self.backbone = load_backbone(
            self.recipe.backbone,
            self.recipe.lora,
            self.task,
            str(folder / kind),
            torch.device("cpu"),
            0,
        )
        for module in self.backbone.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.examples = self.task.encode(self.table)
        self.row = self.backbone.fresh_row(1)

    def train(self, indices=None, seed=3, **job):
        indices = np.arange(len(self.table)) if indices is None else indices
        job = Train(self.row, **job)
        return train(
            self.backbone,
            self.task,
            self.recipe.training,
            self.accelerator,
            job,
            self.examples,
            indices,
            seed,
        )

    def evaluate(self, served, batch_size=4):
        indices = np.arange(len(self.table))
        return evaluate(
            self.backbone, self.task, self.accelerator, served, self.examples, indices, batch_size
        )

    def probabilities(self, row):
        """Of each label for each example, ``(10, 3)``."""
        self.backbone.load_row(row)
        batch = self.task.collate(self.examples, np.arange(len(self.table)))
        with torch.no_grad():
            return (
                self.backbone.model.eval()(**{k: v for k, v in batch.items() if k != "labels"})
                .logits.double()
                .softmax(1)
            )


def plain_step(bench, optimizer, batches, sent=None):
    """One optimizer step on the model's separate tensors, as anybody would write it."""
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
    """Three steps on all examples at once: their order does not matter then."""
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
def test_accumulated_gradients_weigh_every_labelled_token_alike(tiny_models):
    """Completions have 1 to 5 tokens: a mean of micro-batch means would differ from the mean over tokens."""
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


def test_the_proximal_term_holds_the_adapter_near_what_was_sent(tiny_models):
    free, held = (
        Bench(tiny_models, epochs=20, optimizer="sgd", learning_rate=0.1, proximal=mu)
        for mu in (0.0, 1.0)
    )
    assert float((held.train().row - held.row).norm()) < 0.5 * float(
        (free.train().row - free.row).norm()
    )


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_plans_proximal_term_and_anchor_take_the_place_of_the_recipes(tiny_models):
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
    again = train(
        bench.backbone,
        bench.task,
        bench.recipe.training,
        bench.accelerator,
        Train(bench.train().row),
        bench.examples,
        np.arange(10),
        3,
    )
    assert not torch.equal(twice, again.row)


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_example_weights_multiply_each_examples_loss(tiny_models):
    """One SGD step on Σ w_i ℓ_i / n, recomputed by autograd; the weights follow the indices, not the table."""
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


def test_training_leaves_the_callers_random_numbers_alone(tiny_models):
    bench = Bench(tiny_models)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bench.train()
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupted_client_leaves_nothing_to_the_next(tiny_models, monkeypatch):
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
        example_losses(
            bench.backbone, bench.task, bench.accelerator, bench.row, bench.examples, order, 3
        )
        for order in (np.arange(10), np.arange(10)[::-1])
    ]
    assert float(found[0].mean()) == pytest.approx(
        bench.evaluate(bench.row)["loss"], rel=tolerance(torch.float64)
    )
    assert_near(found[0], found[1].flip(0))


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
        RecipeError, match=r"task\.metrics: a mixture of models does not generate text"
    ):
        bench.evaluate(Mixture(bench.row[None], torch.ones(1)))


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
    assert count_steps(10, TrainingRecipe(**{"batch_size": 4, **options})) == steps


def test_warmup_and_decay_follow_the_schedule(tiny_models):
    from fedmerge_peft.training.reference import make_optimizer, make_schedule

    training = TrainingRecipe(schedule="linear", warmup=0.2, learning_rate=1.0)
    optimizer = make_optimizer(torch.nn.Parameter(torch.zeros(1)), training)
    schedule = make_schedule(optimizer, training, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_a_gpu_that_is_absent_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"no CUDA GPU; use training\.device=cpu"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(DeviceError, match="use auto, cpu, mps, cuda or cuda:1"):
        choose_device(device)


def test_fp16_on_a_cpu_is_refused_with_a_reason():
    with pytest.raises(DeviceError, match="fp16 needs a CUDA GPU"):
        choose_precision("fp16", torch.device("cpu"))


def test_auto_precision_is_full_precision_on_a_cpu():
    assert choose_precision("auto", torch.device("cpu")) == "no"


def test_one_process_may_change_its_mind_about_precision():
    for precision in ("no", "bf16", "no"):
        accelerator = make_accelerator(TrainingRecipe(device="cpu", mixed_precision=precision))
        assert accelerator.mixed_precision == precision

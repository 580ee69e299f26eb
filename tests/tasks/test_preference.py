"""Preference pairs: encoding; losses, gradients and rewards of DPO and ORPO against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from equality import tolerance
from fedmerge_peft import Recipe, federate
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import DataError
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.tasks.metrics import reward_accuracy, reward_margin
from fedmerge_peft.training.evaluation import evaluate, evaluate_parts
from fedmerge_peft.training.gradients import accumulate

NAME = "preference"
PAIRS = Dataset.from_dict(
    {
        "prompt": ["Two and three?", "Name a colour:", "Hello", "Why?"] * 3,
        "chosen": [" five", " red", " Good day to you", " So"] * 3,
        "rejected": [" six", " a chair and a table", " No", " Because"] * 3,
    }
)
TURN = [{"role": "user", "content": "Hello"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("Good day", "What?"))
BETA = 0.3


def recipe(**task):
    return Recipe(
        name="preferences",
        task={"name": NAME, "beta": BETA, **task},
        rounds=2,
        backbone={"model": "tiny:llama"},
        lora={"r": 2, "target_modules": "all-linear"},
        data={"path": ".", "partition": {"scheme": "iid", "clients": 2}, "test_fraction": 0.25},
        strategy={"name": "fedmerge", "adapters": 2, "start": "independent"},
        training={"learning_rate": 0.01, "epochs": 1, "batch_size": 2, "device": "cpu"},
    )


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def engine(request):
    return LocalEngine.from_recipe(recipe(loss=request.param), {"train": PAIRS})


def rows(engine, count):
    """Adapters that change the model."""
    size = len(engine.runtime.backbone.row())
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    return engine.runtime.backbone.row() + 0.1 * noise


def expected(engine, row, indices):
    """Losses, rewards and the gradient of the mean loss, independently in float64.

    Sequences run one by one, without padding. The gradient of the log-probabilities is multiplied
    by the derivatives of the loss with respect to them, which ``dpo`` and ``orpo`` write out.
    """
    backbone, columns = engine.runtime.backbone, engine.runtime.examples.columns
    model = backbone.model.double()
    of_pair = dpo if engine.recipe.task.loss == "dpo" else orpo

    def log_probability(index, side):
        ids, labels = (columns[f"{side}_{name}"][index] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None]).logits[0]
        assert logits.dtype == torch.float64
        total, count = logits.new_zeros(()), 0
        for place in range(1, len(ids)):
            if labels[place] != -100:
                scores = logits[place - 1]
                total = total + scores[labels[place]] - torch.logsumexp(scores, dim=0)
                count += 1
        return total, count

    parameters = [each for each in model.parameters() if each.requires_grad]
    for parameter, entry in zip(parameters, backbone.layout.entries, strict=True):
        parameter.data = row[entry.columns].view(entry.shape).double()
    losses, rewards = [], []
    gradient = torch.zeros(len(row), dtype=torch.float64)
    for index in indices:
        with model.disable_adapter(), torch.no_grad():
            reference = [float(log_probability(index, side)[0]) for side in ("chosen", "rejected")]
        policy, counts = zip(
            *(log_probability(index, side) for side in ("chosen", "rejected")), strict=True
        )
        values = [float(each.detach()) for each in policy]
        loss, pair, slopes = of_pair(values, reference, counts)
        losses.append(loss)
        rewards.append(pair)
        objective = (slopes[0] * policy[0] + slopes[1] * policy[1]) / len(indices)
        parts = torch.autograd.grad(objective, parameters)
        gradient += torch.cat([part.flatten() for part in parts])
    return losses, rewards, gradient


def dpo(policy, reference, _):
    """Loss, rewards, and the derivatives of the loss: ∓β σ(−Δ)."""
    pair = [BETA * (own - of) for own, of in zip(policy, reference, strict=True)]
    difference = pair[0] - pair[1]
    slope = BETA / (1 + math.exp(difference))
    return math.log1p(math.exp(-difference)), pair, (-slope, slope)


def orpo(policy, _, counts):
    """Loss, rewards, and the derivatives of the loss.

    With odds o = p / (1 − p) of p = exp l, the loss is −l_c + λ log(1 + o_r / o_c); log o has the
    derivative 1 / (1 − p) with respect to l.
    """
    means = [total / count for total, count in zip(policy, counts, strict=True)]
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
    share = BETA * odds[1] / (odds[0] + odds[1])  # λ σ(−log(o_c / o_r))
    slopes = [share / (1 - math.exp(mean)) for mean in means]
    return (
        -means[0] + BETA * math.log(1 + odds[1] / odds[0]),
        [BETA * mean for mean in means],
        ((-1 - slopes[0]) / counts[0], slopes[1] / counts[1]),
    )


@pytest.fixture
def fresh(engine):
    """A model that the test may convert to float64."""
    return LocalEngine.from_recipe(engine.recipe, {"train": PAIRS})


@pytest.mark.equality
@pytest.mark.parametrize("adapters", [1, 2])
def test_losses_and_gradients_are_those_of_the_papers(engine, fresh, adapters):
    runtime, indices = engine.runtime, np.array([0, 1, 5])
    own = rows(engine, adapters)
    runtime.backbone.eval()
    slots = (
        AdapterSlot(runtime.backbone, own[0])
        if adapters == 1
        else AdapterStack(runtime.backbone, own)
    )
    with torch.enable_grad(), slots.applied():
        losses = accumulate(runtime, slots, [[indices]] * adapters)
    gradients = slots.gradient.clone()
    slots.gradient.zero_()
    for row, loss, gradient in zip(own, losses, gradients, strict=True):
        each, _, wanted = expected(fresh, row, indices)
        assert float(loss) == pytest.approx(np.mean(each), rel=1e-4)
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-3
    assert len({round(float(loss), 5) for loss in losses}) == adapters


@pytest.mark.equality
def test_parts_that_share_batches_have_the_scores_of_each_alone(engine):
    assert engine.runtime.head is not None
    (row,) = rows(engine, 1)
    parts = [np.array([1, 2]), np.array([0, 7, 4])]
    found = evaluate_parts(engine.runtime, row, parts, 8)
    for part, scores in zip(parts, found, strict=True):
        alone = evaluate(engine.runtime, row, part, 8)
        assert scores == pytest.approx(alone, rel=tolerance(torch.float32))


def test_the_metrics_are_those_of_the_rewards(engine, fresh):
    runtime, indices = engine.runtime, np.arange(4)
    (row,) = rows(engine, 1)
    runtime.backbone.load_row(row)
    batch = runtime.collate(indices)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = runtime.task.forward(runtime.backbone.model.eval(), batch)
    chosen, rejected = runtime.task.predict(logits, labels)["rewards"]
    _, wanted, _ = expected(fresh, row, indices)
    np.testing.assert_allclose(np.stack([chosen, rejected], axis=1), wanted, atol=1e-4)
    assert reward_accuracy([1.0, 2.0, 0.0], [0.5, 3.0, 0.0]) == pytest.approx(1 / 3)
    assert reward_margin([1.0, 2.0], [0.5, 3.5]) == -0.5


def test_the_reference_is_computed_once_and_the_first_loss_is_log_2():
    runtime = LocalEngine.from_recipe(recipe(), {"train": PAIRS}).runtime
    with torch.no_grad():
        runtime.backbone.load_row(
            runtime.backbone.fresh_row(1)
        )  # B = 0: the policy is the reference
        batch = runtime.collate(np.arange(4))
        labels = batch.pop("labels")
        logits = runtime.task.forward(runtime.backbone.model.eval(), batch)
    assert labels[..., 0].max() < 0
    losses, _ = runtime.task.losses(logits, labels)
    torch.testing.assert_close(losses, torch.full((4,), math.log(2)), atol=1e-5, rtol=0)


def test_orpo_has_no_reference_and_bears_a_certain_completion(task_of):
    task = task_of("llama", PAIRS, name=NAME, loss="orpo")
    examples = task.encode(PAIRS)
    assert task.finish(None, examples, torch.device("cpu")) is examples
    batch = task.collate(examples, np.array([0]))
    logits = torch.zeros(2, batch["input_ids"].shape[1], len(task.processor))
    logits[:, :-1].scatter_(2, batch["input_ids"][:, 1:, None], 1e4)  # probability 1
    logits.requires_grad_()
    loss, _ = task.losses(logits, batch["labels"])
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_clients_learn_preferences_and_complete_prompts(tmp_path, loss):
    run = federate(recipe(loss=loss), tmp_path / "run", data=PAIRS)
    scores = run.scores()
    assert {"test_loss", "test_reward_accuracy", "test_reward_margin"} <= set(
        next(iter(scores.values()))
    )
    client = run.client_names[0]
    (text,) = run.predict({client: ["Hello"]}, device="cpu")[client]
    assert isinstance(text, str)


# --- rows -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "table",
    [
        {"prompt": [TURN], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [[*TURN, *GOOD]], "rejected": [[*TURN, *BAD]]},
    ],
    ids=["a prompt", "chats that begin alike"],
)
def test_chats_are_rendered_with_the_template(task_of, table):
    table = Dataset.from_dict(table)
    task = task_of("llama", table, name=NAME)
    columns = task.encode(table).columns
    for side, answer in (("chosen", "Good day"), ("rejected", "What?")):
        ids, labels = (columns[f"{side}_{name}"][0] for name in ("input_ids", "labels"))
        assert task.processor.decode(ids) == f"<s>[user] Hello</s>[assistant] {answer}</s>"
        assert task.processor.decode(labels[labels != -100]).strip() == f"{answer}</s>"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prompt": ["a"], "chosen": ["b"]}, "task.rejected: there is no column 'rejected'"),
        ({"chosen": ["b"], "rejected": ["c"]}, "task.prompt: there is no column 'prompt'"),
        (
            {"ask": [TURN], "chosen": ["b"], "rejected": ["c"]},
            "task.chosen: the column 'ask' has lists of messages, but 'chosen' does not",
        ),
        ({"chosen": [TURN], "rejected": [TURN]}, "row 0 .* must begin with the same messages"),
        (
            {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c", None]},
            "row 1 .* column 'rejected' is empty",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_refused(task_of, table, message):
    prompt = "ask" if "ask" in table else "prompt"
    with pytest.raises(DataError, match=message):
        task_of("llama", Dataset.from_dict(table), name=NAME, prompt=prompt)


def test_equal_completions_are_counted(task_of):
    table = Dataset.from_dict({"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c", "b"]})
    cuts = task_of("llama", table, name=NAME).encode(table).cuts
    same = "have the same chosen and rejected completion, so there is no preference to learn"
    assert cuts[same] == [1]


def test_examples_are_shown_with_both_completions(task_of):
    task = task_of("llama", PAIRS, name=NAME)
    roles = [segment.role for segment in task.show(PAIRS.select([0]))[0].segments]
    assert roles == [
        "chosen: prompt",
        "chosen: completion",
        "rejected: prompt",
        "rejected: completion",
    ]

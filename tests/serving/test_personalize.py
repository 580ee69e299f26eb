"""A newcomer's merging weights: known answers on quadratic losses, and runs on tiny models."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from PIL.Image import fromarray
from transformers import AutoModelForSequenceClassification

from equality import assert_near
from fedmerge_peft import AdapterSoup, Recipe, RunError, RunExistsError, federate, personalize
from fedmerge_peft.serving.personalize import _Comparison, distinct, learn_logits
from fedmerge_peft.strategies.server_step import weights_gradient
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from serving.newcomer import LEARNED, LOCAL, newcomer, numbers

# ---- learning the logits -------------------------------------------------------------------------


def quadratic(target):
    def objective(row):
        return float((row - target).square().sum() / 2), row - target

    return objective


def test_weights_that_make_the_loss_zero_are_found():
    rows, weights = (
        torch.randn(4, 50, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.1, 0.6, 0.05, 0.25]),
    )
    logits, loss = learn_logits(rows, torch.full((4,), 0.25), quadratic(weights @ rows), steps=200)
    torch.testing.assert_close(torch.softmax(logits, 0).float(), weights, atol=0.02, rtol=0)
    assert loss < 0.05


def test_the_right_adapter_gets_the_weight_from_a_wrong_start():
    rows = torch.eye(3, 20) * 5
    logits, _ = learn_logits(rows, torch.tensor([1.0, 0.0, 0.0]), quadratic(rows[2]))
    assert torch.softmax(logits, 0)[2] > 0.95


def test_the_best_weights_seen_are_kept():
    rows, losses = torch.eye(2), iter([3.0, 1.0, *[2.0] * 98])
    seen = []

    def objective(row):
        seen.append(row)
        return next(losses), row

    logits, loss = learn_logits(rows, torch.tensor([0.5, 0.5]), objective)
    assert loss == 1.0
    torch.testing.assert_close(torch.softmax(logits, 0).float(), seen[1])
    assert len(seen) == 7  # the best, and five steps without gain after it


def test_the_client_next_to_the_best_adapter_is_compared(run, tickets, monkeypatch):
    comparison = _Comparison(newcomer(run, tickets), run.soup, torch.zeros(run.soup.layout.size))
    monkeypatch.setattr(comparison, "_loss", lambda row: float((row - run.soup.rows[2]).norm()))
    known = torch.cat([0.94 * torch.eye(3) + 0.02, torch.tensor([[0.5, 0.5, 0.0]])])
    comparison.learn(known, ["a", "b", "c", "d"])
    assert [method.detail for method in comparison.methods[1:3]] == ["adapter 2", "c"]


def test_the_gradient_is_that_of_the_training_loss_through_the_merge(run, tickets):
    engine = newcomer(run, tickets)
    comparison = _Comparison(engine, run.soup, torch.zeros(run.soup.layout.size))
    rows, logits = (
        run.soup.rows + 0.1 * torch.randn_like(run.soup.rows),
        torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64),
    )

    def loss(logits):
        return comparison._objective(torch.softmax(logits, 0).float() @ rows)[0]

    weights = torch.softmax(logits, 0)
    _, gradient = comparison._objective(weights.float() @ rows)
    found = weights_gradient(rows, weights[None], gradient[None])[0]
    steps = 0.05 * torch.eye(3, dtype=torch.float64)
    expected = torch.tensor(
        [(loss(logits + step) - loss(logits - step)) / 0.1 for step in steps], dtype=torch.float64
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-4)


def test_distinct_rows_are_far_from_each_other_and_from_what_is_covered():
    known = torch.tensor([[1.0, 0.0], [0.98, 0.02], [0.6, 0.4], [0.62, 0.38], [0.3, 0.7]])
    assert sorted(distinct(known, torch.eye(2))) == [2, 4]
    assert distinct(known, torch.eye(2), most=1) == [2]
    assert distinct(known[:2], torch.eye(2)) == []


# ---- whole runs ----------------------------------------------------------------------------------


def test_an_adapter_trained_on_the_newcomer_gets_the_weight(copy, tickets):
    engine, rows = newcomer(copy, tickets), copy.soup.rows.clone()
    training = copy.recipe.training.model_copy(update={"learning_rate": 1e-2, "epochs": 12})
    job = Job(Train(rows[1]), engine.clients[0].train, 0)
    rows[1] = train(engine.runtime, training, [job])[0].row
    AdapterSoup(rows, copy.soup.layout).save(copy.path / "soup.safetensors")
    result = personalize(copy, tickets, test_fraction=0, local=False)
    assert result.weights[1] > 0.9
    assert numbers(result, "best single adapter").detail == "adapter 1"
    torch.testing.assert_close(result.row, result.weights @ rows)


def test_learned_weights_are_never_worse_than_their_starting_points(run, tickets):
    result = personalize(run, tickets)
    assert [method.name for method in result.methods[:2]] == ["mean adapter", "best single adapter"]
    starts = [method.train_loss for method in result.methods if method.name not in (LEARNED, LOCAL)]
    assert numbers(result, LEARNED).train_loss <= min(starts) + 1e-6
    assert result.examples == {"train": 17, "test": 7}
    assert all(method.test.keys() == {"loss", "accuracy"} for method in result.methods)
    assert result.weights.sum() == pytest.approx(1)
    assert result.nearest in run.clients.index
    assert "numpy" not in json.dumps([vars(method) for method in result.methods])


def test_the_same_seed_gives_the_same_result(run, tickets):
    one, two = personalize(run, tickets), personalize(run, tickets)
    assert torch.equal(one.logits, two.logits)
    assert [method.train_loss for method in one.methods] == [
        method.train_loss for method in two.methods
    ]
    other = personalize(run, tickets, seed=1)
    assert numbers(other, "mean adapter").train_loss != numbers(one, "mean adapter").train_loss


def test_a_single_example_without_a_test_set_is_enough(run, tickets):
    result = personalize(run, tickets.select([3]), name="tiny")
    assert result.examples == {"train": 1, "test": 0}
    assert all(method.test == {} for method in result.methods)
    assert personalize(run, tickets, max_train=4, local=False).examples == {"train": 4, "test": 7}


def test_the_best_rounds_soup_can_be_used(run, tickets):
    best, _ = run.state(best=True)
    assert torch.equal(personalize(run, tickets, best=True, local=False).soup.rows, best.rows)


def test_a_run_without_a_best_round_is_refused(copy, tickets):
    shutil.rmtree(copy.path / "best")
    with pytest.raises(RunError, match="has no best round"):
        personalize(copy, tickets, best=True)


def test_a_saved_adapter_loads_in_plain_peft_and_gives_the_same_logits(
    run, tickets, engine, tiny_models, tmp_path
):
    result = personalize(run, tickets, local=False)
    assert result.save(tmp_path / "new") == tmp_path / "new"
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_models / "bert", num_labels=6)
    plain = PeftModel.from_pretrained(plain, tmp_path / "new").eval()
    engine.backbone.load_row(result.row)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_near(plain(input_ids=tokens).logits, engine.backbone.model(input_ids=tokens).logits)
    document = json.loads((tmp_path / "new" / "weights.json").read_text())
    assert document["weights"] == result.weights.tolist()
    assert torch.softmax(torch.tensor(document["logits"]), 0).tolist() == pytest.approx(
        document["weights"]
    )
    assert [method["name"] for method in document["methods"]] == [
        method.name for method in result.methods
    ]


def test_existing_files_are_not_overwritten(run, tickets, tmp_path):
    result = personalize(run, tickets, local=False)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunExistsError, match="already holds other files"):
        result.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# ---- the other tasks -----------------------------------------------------------------------------


def pairs():
    rows = [{"text": f"ticket {n}", "reply": f"answer {n % 3}", "label": n % 3} for n in range(12)]
    task = {"name": "sequence-classification", "text_pair": "reply"}
    return Dataset.from_list(rows), "tiny:bert", ["query"], task, {"loss", "accuracy"}


def completions():
    rows = [
        {"prompt": f"What is {n}? ", "completion": "one two three"[: 3 + n % 5]} for n in range(12)
    ]
    return (
        Dataset.from_list(rows),
        "tiny:gpt2",
        ["c_attn"],
        {"name": "causal-lm"},
        {"loss", "perplexity"},
    )


def images():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3), dtype=np.uint8)
    rows = {"image": [fromarray(each) for each in pixels], "label": [n % 3 for n in range(12)]}
    table = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    return (
        table,
        "tiny:vit",
        ["q_proj", "query"],
        {"name": "image-classification"},
        {"loss", "accuracy"},
    )


@pytest.mark.parametrize("make", [pairs, completions, images])
def test_newcomers_can_join_runs_of_other_tasks(make, tmp_path):
    table, model, modules, task, scores = make()
    table.add_column("site", ["a", "b"] * 6).to_parquet(tmp_path / "all.parquet")
    table.select(range(6)).to_parquet(tmp_path / "new.parquet")
    changed = {
        "task": task,
        "backbone": {"model": model},
        "lora": {"r": 2, "target_modules": modules[:1]},
        "data": {
            "path": str(tmp_path / "all.parquet"),
            "partition": {"scheme": "natural", "by": "site"},
        },
        "strategy": {"name": "fedmerge", "adapters": 2},
    }
    run = federate(
        Recipe(
            name="other", rounds=1, training={"device": "cpu", "learning_rate": 1e-2}, **changed
        ),
        tmp_path / "run",
    )
    result = personalize(run, tmp_path / "new.parquet")
    assert result.examples == {"train": 4, "test": 2}
    assert all(method.test.keys() == scores for method in result.methods)
    starts = [method.train_loss for method in result.methods if method.name not in (LEARNED, LOCAL)]
    assert numbers(result, LEARNED).train_loss <= min(starts) + 1e-6

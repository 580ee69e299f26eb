"""Sentence embeddings: vectors, contrastive losses within clients, retrieval, edge cases."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from torch.nn import functional

from equality import assert_near
from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.plugins import METRICS
from fedmerge_peft.report.page import write_report
from fedmerge_peft.training.batching import clients_per_batch
from task_bench import RATE, TaskBench, assert_same_step, run_of

NAME = "sentence-embedding"
LORA = {"target_modules": ["query", "value"]}
ANCHORS = ["Where is my parcel?", "I was charged twice", "It crashes", "She liked the film", "Hi"]
POSITIVES = ["The parcel is late", "A refund, please", "An error is shown", "A good film", "Hello"]
NEGATIVES = ["The fox is late", "A dog, please", "No colors are shown", "A long ending", "Bye"]
PAIRS = Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})
TRIPLETS = PAIRS.add_column("negative", NEGATIVES)


def bench_of(tiny_models, table=PAIRS, **task):
    if "negative" in table.column_names:
        task = {"negative": "negative", **task}
    return TaskBench(tiny_models / "bert", table, {"name": NAME, **task}, LORA)


def plain_loss(model, tokenizer, columns, scale=20.0):
    """InfoNCE of whole columns of texts, by the formulas of sentence-transformers."""
    vectors = []
    for texts in columns:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        vectors.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    scores = scale * vectors[0] @ torch.cat(vectors[1:]).T
    return functional.cross_entropy(scores, torch.arange(len(scores)))


@pytest.mark.parametrize("table", [PAIRS, TRIPLETS], ids=["pairs", "triplets"])
def test_one_step_equals_an_independent_one_in_plain_peft(tiny_models, float64, table, tmp_path):
    bench = bench_of(tiny_models, table)
    row = bench.row()
    model = bench.plain_peft(row, tmp_path)
    loss = plain_loss(model, bench.task.processor, [column[:] for column in table[:].values()])
    loss.backward()
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter -= RATE * parameter.grad
    expected = get_peft_model_state_dict(model)
    assert bench.scores(row, 5)["loss"] == pytest.approx(loss.item(), rel=1e-10)
    assert_same_step(bench.trained(row), expected, bench.backbone.layout.state_dict(row))


@pytest.mark.slow
def test_the_loss_equals_that_of_sentence_transformers(tiny_models):
    losses = pytest.importorskip("sentence_transformers.losses")
    bench = bench_of(tiny_models, TRIPLETS)
    vectors, labels = bench.logits()
    wanted = losses.MultipleNegativesRankingLoss(model=None)
    parts = [*vectors.view(*labels.shape, -1).unbind(1)]
    found, counts = bench.task.losses(vectors, labels)
    assert_near(found.sum() / counts.sum(), wanted.compute_loss_from_embeddings(parts, None))


@pytest.mark.equality
def test_negatives_are_those_of_the_own_client_only(tiny_models):
    bench = bench_of(tiny_models)
    adapters = torch.stack([bench.row(1), bench.row(2), bench.row(3)])
    rows = [np.array([0, 3, 4]), np.array([1, 2]), np.array([2, 1, 0])]
    for together, alone in zip(*bench.gradients(adapters, rows), strict=True):
        assert float(alone.norm()) > 0
        assert_near(together, alone)
    training = bench.recipe.training.model_copy(update={"clients_per_batch": 4, "batch_size": 2})
    assert clients_per_batch(bench.runtime, training, bench.rows) == 4


def test_a_repeated_text_is_one_candidate(tiny_models):
    """Neither a repeated positive, nor one of the same anchor, nor the anchor is a negative."""
    table = Dataset.from_dict(
        {
            "anchor": ["It crashes", "An error is shown", "It crashes", "Hi"],
            "positive": ["A bug", "A bug", "A fault", "It crashes"],
        }
    )
    bench = bench_of(tiny_models, table)
    vectors, labels = bench.logits()
    units = functional.normalize(vectors, dim=-1).view(4, 2, -1)
    scores = 20 * units[:, 0] @ units[:, 1].T
    candidates = [[0], [1, 2, 3], [2], [3, 0, 2]]
    wanted = [
        functional.cross_entropy(scores[row, own], torch.tensor(0))
        for row, own in enumerate(candidates)
    ]
    assert_near(bench.task.losses(vectors, labels)[0], torch.stack(wanted))
    again, repeated = bench.logits(np.array([0, 1, 2, 3, 3, 0]))
    assert_near(bench.task.losses(again, repeated)[0][:4], torch.stack(wanted))


def test_retrieval_metrics_of_made_vectors():
    def unit(degrees):
        return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])

    anchors = [unit(0), unit(90), unit(45), unit(0)]
    rows = [
        ([0, 10], [anchors[0], unit(10)]),  # nearest
        ([1, 11], [anchors[1], unit(170)]),  # third: 60 and 30 degrees are nearer
        ([2, 12], [anchors[2], unit(60)]),  # second: another text is as near
        ([0, 13], [anchors[3], unit(30)]),  # another positive of the first anchor
    ]
    ranks = np.array([1, 4, 2, 1])
    score = {name: METRICS[name].load()(anchors, rows) for name in ("mrr", "recall_at_1")}
    assert score["mrr"] == pytest.approx(np.mean(1 / ranks))
    assert score["recall_at_1"] == pytest.approx(np.mean(ranks <= 1))
    assert METRICS["recall_at_10"].load()(anchors, rows) == 1


def test_an_adapter_embeds_the_same_in_plain_peft(tiny_models, tmp_path):
    bench = bench_of(tiny_models)
    row = bench.row()
    bench.backbone.load_row(row)
    vectors, labels = bench.logits()
    model = bench.plain_peft(row, tmp_path).float().eval()
    for place, text in enumerate((ANCHORS[0], POSITIVES[0])):
        batch = bench.task.processor([text], return_tensors="pt")
        with torch.no_grad():
            alone = model(**batch).last_hidden_state.mean(dim=1)[0]
        assert_near(vectors.view(*labels.shape, -1)[0, place], alone)


def test_a_run_predicts_exports_and_reports(tmp_path, caplog):
    rows = [
        {"client": client, "anchor": f"question {row} of {client}", "positive": f"{client} {row}"}
        for client in ("north", "south")
        for row in range(6)
    ]
    sections = {"backbone": {"model": "tiny:bert"}, "lora": {"r": 2, **LORA}}
    run = run_of(tmp_path / "run", rows, {"name": NAME}, **sections)
    assert "one at a time" not in caplog.text
    texts = ["question 2 of north", "Hi"]
    found = run.predict({"north": texts, "south": texts[:1]}, device="cpu")
    north, south = (np.array(found[client][0]["embedding"]) for client in ("north", "south"))
    assert [len(found[client]) for client in ("north", "south")] == [2, 1]
    assert np.linalg.norm(north) == pytest.approx(1)
    assert north.shape == south.shape == (32,)
    embed = run.client("north").pipeline(device="cpu")
    vector = np.array(embed(texts[0])[0]).mean(axis=0)
    assert vector / np.linalg.norm(vector) == pytest.approx(north, abs=1e-5)
    card = (run.client("north").save(tmp_path / "north") / "README.md").read_text()
    assert "AutoModel.from_pretrained('tiny:bert'" in card
    write_report([run.path], tmp_path / "report.html")
    assert "mrr" in (tmp_path / "report.html").read_text()
    with pytest.raises(DataError, match="an input must be a text, found 3"):
        run.predict({"north": [3]}, device="cpu")
    with pytest.raises(RecipeError, match=r"training.batch_size: found 1, .*use 2 or more"):
        run_of(tmp_path / "1", rows, {"name": NAME}, **sections, training={"batch_size": 1})
    with pytest.raises(RecipeError, match="fedem mixes the outputs of several adapters"):
        run_of(tmp_path / "2", rows, {"name": NAME}, **sections, strategy="fedem")


# --- edge cases -----------------------------------------------------------------------------------
def test_a_client_without_negatives_has_no_loss(tiny_models, caplog, tmp_path):
    bench = bench_of(tiny_models)
    row = bench.row()
    start = bench.backbone.layout.state_dict(row)
    after = bench.trained(row, np.array([1]))
    assert all(torch.equal(after[name], start[name]) for name in start)
    assert bench.scores(row, rows=np.array([1])) == {"loss": 0, "mrr": 1, "recall_at_1": 1}
    rows = [
        {"client": client, "anchor": f"a {row}", "positive": f"b {row}"}
        for client, count in (("north", 1), ("south", 9))
        for row in range(count)
    ]
    sections = {"backbone": {"model": "tiny:bert"}, "lora": {"r": 2, **LORA}}
    with caplog.at_level(logging.WARNING):
        run_of(tmp_path / "run", rows, {"name": NAME}, **sections, rounds=1)
    wanted = "clients with fewer than 2 training examples learn nothing (1 of 2): north"
    assert wanted in caplog.text
    with pytest.raises(DataError, match="each client has fewer than 2 training examples"):
        run_of(tmp_path / "1", rows[:1], {"name": NAME}, **sections)


def test_long_and_empty_texts_are_counted(tiny_models):
    table = Dataset.from_dict({"anchor": ["", "a " * 30], "positive": ["a", " "]})
    bench = bench_of(tiny_models, table, max_length=8)
    assert bench.runtime.examples.cuts == {
        "have a text of more than 8 tokens, truncated": [1],
        "have an empty text": [0, 1],
    }
    assert max(bench.runtime.examples.columns["sequences"][1]) == 8


@pytest.mark.parametrize("column", ["anchor", "positive", "negative"])
def test_missing_columns_are_refused(task_of, column):
    table = TRIPLETS.remove_columns(column)
    with pytest.raises(DataError, match=f"task.{column}: there is no column '{column}'"):
        task_of("bert", table, name=NAME, negative="negative").encode(table)

"""Training several clients in one pass equals training one at a time."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from equality import assert_near, tolerance
from fedmerge_peft import ClientError, Federation
from fedmerge_peft.engines import local
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.loop import train
from fedmerge_peft.training.plan import Train


def engine_of(recipe):
    engine = LocalEngine.from_recipe(recipe)
    for module in engine.backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return engine


STRATEGIES = {
    "fedmerge": "adapters: 3, start: independent",
    "fedem": "adapters: 2",
    "ditto": "regularization: 0.5",
    "ifca": "adapters: 3",
    "fedrep": "",
    "feddpa": "",
}


@pytest.mark.equality
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_federation_in_batches_of_four_equals_one_client_at_a_time(smoke, name):
    def federation(clients):
        strategy = f"strategy={{name: {name}, {STRATEGIES[name]}}}"
        recipe = smoke(
            strategy,
            "rounds=2",
            "training.optimizer=sgd",
            "training.learning_rate=0.1",
            f"training.clients_per_batch={clients}",
        )
        federation = Federation(recipe, engine_of(recipe))
        return federation, federation.strategy.soup.rows.clone(), list(federation.rounds())

    (one, start, records), (four, _, others) = federation(1), federation(4)
    assert (one.engine.clients_per_batch, four.engine.clients_per_batch) == (1, 4)
    assert_near(four.strategy.soup.rows, one.strategy.soup.rows, start)
    assert_near(four.strategy.weights, one.strategy.weights)
    near = partial(pytest.approx, rel=tolerance(torch.float32))
    for record, other in zip(records, others, strict=True):
        assert other.train_loss == near(record.train_loss)
        assert other.clients == record.clients
        for client, scores in record.finetuned.clients.items():
            assert other.finetuned.clients[client]["test_loss"] == near(scores["test_loss"])


def replies_of(engine, round, assignments):
    return [reply for _, reply in engine.train_clients(round, assignments)]


def test_assignments_are_made_as_they_are_needed(smoke):
    engine = engine_of(smoke("training.clients_per_batch=2"))
    row, asked = engine.strategy_context().fresh_row(0), []

    def assignments():
        for client in range(6):
            asked.append(client)
            yield client, Assignment(Train(row))

    replies = engine.train_clients(1, assignments())
    plan, reply = next(replies)
    assert (reply.client, plan.row is row) == (0, True)
    assert asked == [0, 1]
    assert [reply.client for _, reply in replies] == [1, 2, 3, 4, 5]


def test_a_client_that_fails_in_a_batch_is_named(smoke, monkeypatch, caplog):
    engine = engine_of(smoke("training.clients_per_batch=4"))
    row, culprit, collate = (
        engine.strategy_context().fresh_row(0),
        engine.clients[2],
        engine.task.collate,
    )
    assert engine.clients_per_batch == 4

    def fail(examples, indices):
        if np.isin(indices, culprit.train).any():
            raise ZeroDivisionError("no luck")
        return collate(examples, indices)

    monkeypatch.setattr(engine.task, "collate", fail)
    answers = replies_of(engine, 3, [(client, Assignment(Train(row))) for client in range(4)])
    assert [answer.client for answer in answers] == [0, 1, culprit.name, 3]
    assert str(answers[2]) == f"client {culprit.name}, round 3: ZeroDivisionError: no luck"
    assert isinstance(answers[2].__cause__, ZeroDivisionError)
    assert (
        "4 clients train one at a time, because their joint pass failed: ZeroDivisionError: no luck"
        in caplog.text
    )


def test_a_client_with_a_nonfinite_adapter_is_named_and_does_not_affect_its_batch(smoke):
    engine = engine_of(smoke("training.clients_per_batch=4"))
    row = engine.strategy_context().fresh_row(0)
    rows = [row * torch.nan if client == 2 else row for client in range(4)]
    plans = [(client, Assignment(Train(start))) for client, start in enumerate(rows)]
    answers = replies_of(engine, 1, plans)
    assert all(answers[client].delta.isfinite().all() for client in (0, 1, 3))
    assert isinstance(answers[2], ClientError)
    assert str(answers[2]).startswith(
        f"client {engine.clients[2].name}, round 1: its adapter is not finite"
    )


def test_out_of_memory_reduces_the_clients_per_batch(smoke, monkeypatch, caplog):
    engine = engine_of(smoke("training.clients_per_batch=6"))
    row, sizes = engine.strategy_context().fresh_row(0), []

    def small(runtime, training, jobs):
        sizes.append(len(jobs))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return train(runtime, training, jobs)

    monkeypatch.setattr(local, "train", small)
    replies = replies_of(engine, 1, [(client, Assignment(Train(row))) for client in range(6)])
    assert [reply.client for reply in replies] == list(range(6))
    assert sizes == [6, 3, 2, 2, 2]
    assert engine.clients_per_batch == 2
    assert "the limit of clients that train in one pass is now 2" in caplog.text

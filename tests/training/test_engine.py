"""What an engine lets a client do and measures of it, on a tiny model."""

from itertools import pairwise

import pytest
import torch

from fedmerge_peft import Federation
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.evaluation import evaluate, example_losses


def losses_on(engine, row, indices):
    return example_losses(engine.backbone, engine.task, engine.accelerator, row, engine.examples, indices, 4)


def test_a_clients_losses_are_those_of_its_training_examples(smoke_engine):
    row = smoke_engine.start().fresh_row(3)
    for client in smoke_engine.clients:
        found = smoke_engine._losses(client, row)
        torch.testing.assert_close(found, losses_on(smoke_engine, row, client.train))
        scores = evaluate(smoke_engine.backbone, smoke_engine.task, smoke_engine.accelerator, row, smoke_engine.examples, client.train, 4)
        assert float(found.mean()) == pytest.approx(scores["loss"], rel=1e-5)
        assert not set(client.train) & {*client.test, *client.validation}


def test_ifca_chooses_by_training_losses(smoke, smoke_engine):
    federation = Federation(smoke("strategy={name: ifca, adapters: 8}", "rounds=1"), smoke_engine)
    rows, choices = federation.strategy.soup.rows, {}
    list(federation.rounds(lambda reply: choices.update({reply.client: reply.choice})))

    def best(part):
        clients = smoke_engine.clients
        return [int(torch.stack([losses_on(smoke_engine, row, getattr(c, part)).sum() for row in rows]).argmin()) for c in clients]

    assert [choices[client] for client in range(6)] == best("train") != best("test")


def test_what_dittos_clients_have_after_training_is_what_they_are_served_with_in_the_next_round(smoke):
    recipe = smoke("strategy={name: ditto, regularization: 1.0}", "rounds=3", "training.learning_rate=0.02")
    records = list(Federation(recipe, LocalEngine.from_recipe(recipe)).rounds())
    for now, then in pairwise(records):
        for name, scores in now.finetuned.clients.items():
            assert then.served.clients[name] == pytest.approx(scores, rel=1e-5)
            assert now.served.clients[name]["test_loss"] != pytest.approx(scores["test_loss"], rel=1e-3)

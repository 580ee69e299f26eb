"""Training and evaluation of single clients by an engine, on a tiny model."""

from itertools import pairwise

import pytest
import torch

from equality import tolerance
from fedmerge_peft import Federation
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.evaluation import evaluate, evaluate_parts, example_losses
from fedmerge_peft.training.plan import Train


def losses_on(engine, row, indices):
    return example_losses(engine.runtime, row, indices, 4)


@pytest.mark.equality
def test_a_clients_losses_are_those_of_its_training_examples(smoke_engine):
    row = smoke_engine.strategy_context().fresh_row(3)
    for client in smoke_engine.clients:
        losses = losses_on(smoke_engine, row, client.train)
        scores = evaluate(smoke_engine.runtime, row, client.train, 4)
        assert float(losses.mean()) == pytest.approx(scores["loss"], rel=tolerance(torch.float32))
        assert not set(client.train) & {*client.test, *client.validation}


def test_ifca_chooses_by_training_losses(smoke, smoke_engine):
    federation = Federation(smoke("strategy={name: ifca, adapters: 8}", "rounds=1"), smoke_engine)
    rows, choices = federation.strategy.soup.rows, {}
    list(federation.rounds(lambda reply: choices.update({reply.client: reply.choice})))

    def best(part):
        clients = smoke_engine.clients
        return [
            int(
                torch.stack(
                    [losses_on(smoke_engine, row, getattr(c, part)).sum() for row in rows]
                ).argmin()
            )
            for c in clients
        ]

    assert [choices[client] for client in range(6)] == best("train") != best("test")


@pytest.mark.equality
def test_dittos_clients_are_served_their_trained_adapters_in_the_next_round(
    smoke,
):
    recipe = smoke(
        "strategy={name: ditto, regularization: 1.0}", "rounds=3", "training.learning_rate=0.02"
    )
    records = list(Federation(recipe, LocalEngine.from_recipe(recipe)).rounds())
    for now, then in pairwise(records):
        for name, scores in now.finetuned.clients.items():
            assert then.served.clients[name] == pytest.approx(scores, rel=tolerance(torch.float32))
            assert now.served.clients[name]["test_loss"] != pytest.approx(
                scores["test_loss"], rel=1e-3
            )


@pytest.mark.equality
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_validation_losses_are_those_before_and_after_training(smoke, fraction):
    recipe = smoke(f"data.validation_fraction={fraction}")
    engine = LocalEngine.from_recipe(recipe)
    row = engine.strategy_context().fresh_row(0)
    assigned = Assignments.of([(0, Assignment(Train(row), validated=True))])
    ((_, reply),) = engine.train_clients(1, assigned)
    if not fraction:
        assert reply.validation is None
        return
    expected = [
        evaluate(engine.runtime, sent, engine.clients[0].validation, 4)["loss"]
        for sent in (row, row - reply.delta)
    ]
    assert reply.validation == pytest.approx(expected, rel=tolerance(torch.float32))
    assert reply.served is None


@pytest.mark.parametrize(("strategy", "scored"), [("local", 6 + 4 * 6), ("fedavg", 4 * 12 + 6)])
def test_the_same_adapter_is_scored_once(smoke, monkeypatch, strategy, scored):
    """A client that trains alone is served its trained adapter; its scores are reused."""
    asked = []
    monkeypatch.setattr(
        "fedmerge_peft.engines.scoring.evaluate_parts",
        lambda *given: asked.append(given) or evaluate_parts(*given),
    )
    recipe = smoke(f"strategy={{name: {strategy}}}", "rounds=4", "data.validation_fraction=0")
    engine = LocalEngine.from_recipe(recipe)
    federation = Federation(recipe, engine)
    records = list(federation.rounds())
    last = federation.evaluate()
    assert len(asked) == scored
    for now, then in zip(records, [record.served for record in records[1:]] + [last], strict=True):
        same = [then.clients[name] == scores for name, scores in now.finetuned.clients.items()]
        assert all(same) == (strategy == "local")
    fresh = LocalEngine.from_recipe(recipe)
    assert dict(
        fresh.evaluate_clients((index, federation.strategy.served(index)) for index in range(6))
    ) == {index: last.clients[client.name] for index, client in enumerate(engine.clients)}


def test_another_clients_scores_are_not_reused(smoke_engine):
    row = smoke_engine.strategy_context().fresh_row(1)
    scores = dict(smoke_engine.evaluate_clients((index, row) for index in range(6)))
    assert len({each["test_loss"] for each in scores.values()}) == 6
    assert dict(smoke_engine.evaluate_clients((index, row + 0.1) for index in range(6))) != scores


def test_scores_on_other_frozen_weights_are_not_reused(smoke_engine):
    row, backbone = smoke_engine.strategy_context().fresh_row(1), smoke_engine.backbone
    (before,) = dict(smoke_engine.evaluate_clients([(0, row)])).values()
    try:
        name = next(iter(backbone.scaling))
        backbone.set_base(
            {name: torch.full_like(backbone.model.get_submodule(name).base_layer.weight, 0.1)}
        )
        (other,) = dict(smoke_engine.evaluate_clients([(0, row)])).values()
    finally:
        backbone.set_base({})
    (after,) = dict(smoke_engine.evaluate_clients([(0, row)])).values()
    assert before == after
    assert before["test_loss"] != other["test_loss"]

"""Clients that are evaluated in one pass have the scores that each has alone."""

import numpy as np
import pytest
import torch

from equality import tolerance
from fedmerge_peft import ClientError, Federation
from fedmerge_peft.engines import scoring
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.plan import Mixture, Train

ROOM = "evaluation.batch_size=32"
"""For four clients of the smoke recipe, which have at most eight examples to evaluate."""


@pytest.fixture
def passes(monkeypatch):
    """Numbers of clients in each pass, of scores and of validation losses."""
    counts = []

    def counted(name, count):
        compute = getattr(scoring, name)
        monkeypatch.setattr(
            scoring, name, lambda *given: counts.append(count(*given)) or compute(*given)
        )

    counted("evaluate_together", lambda runtime, rows, parts: len(rows))
    counted("evaluate_parts", lambda *given: 1)
    counted("losses_together", lambda runtime, rows, indices: -len(rows))
    counted("example_losses", lambda *given: -1)
    return counts


def rows_of(engine):
    generator = torch.Generator().manual_seed(0)
    row = engine.strategy_context().fresh_row(0)
    return [row + 0.1 * torch.randn(len(row), generator=generator) for _ in engine.clients]


def near(scores, others):
    assert scores.keys() == others.keys()
    for client, own in scores.items():
        assert own == pytest.approx(others[client], rel=tolerance(torch.float32))


@pytest.mark.equality
def test_a_federation_scores_four_clients_at_once_as_it_scores_each(smoke, passes):
    def federation(clients):
        recipe = smoke(
            "rounds=2",
            "training.optimizer=sgd",
            "training.learning_rate=0.1",
            "training.clients_per_batch=6",
            ROOM,
            f"evaluation.clients_per_batch={clients}",
        )
        federation = Federation(recipe, LocalEngine.from_recipe(recipe))
        records, last = list(federation.rounds()), federation.evaluate()
        used = passes.copy()
        passes.clear()
        return records, last, used

    (one, last_one, alone), (four, last_four, shared) = federation(1), federation(4)
    assert set(alone) == {1}
    assert set(shared) == {4, 2}
    for record, other in zip(one, four, strict=True):
        near(record.served.clients, other.served.clients)
        near(record.finetuned.clients, other.finetuned.clients)
    near(last_one.clients, last_four.clients)


@pytest.mark.equality
def test_validation_losses_of_several_clients_share_passes(smoke, passes):
    def replies(clients):
        engine = LocalEngine.from_recipe(
            smoke(
                "training.optimizer=sgd",
                "data.validation_fraction=0.3",
                "training.clients_per_batch=6",
                ROOM,
                f"evaluation.clients_per_batch={clients}",
            )
        )
        rows = rows_of(engine)
        plans = [
            Train(row, compared=other) for row, other in zip(rows, rows[1:] + rows, strict=False)
        ]
        asked = [(number, Assignment(plan, validated=True)) for number, plan in enumerate(plans)]
        return [reply.validation for _, reply in engine.train_clients(1, Assignments.of(asked))]

    alone, shared = replies(1), replies(4)
    assert passes == [-1] * 18 + [-4, -4, -4, -4, -2]
    for losses, others in zip(alone, shared, strict=True):
        assert len(losses) == len(set(losses)) == 3
        assert others == pytest.approx(losses, rel=tolerance(torch.float32))


def test_passes_have_room_for_the_examples_of_all_their_clients(smoke, passes):
    engine = LocalEngine.from_recipe(smoke("evaluation.clients_per_batch=4", ROOM))
    rows = rows_of(engine)
    sizes = [len(client.validation) + len(client.test) for client in engine.clients]
    assert max(sizes) * 4 <= 32
    scores = dict(engine.evaluate_clients(enumerate(rows)))
    assert list(scores) == list(range(6))
    assert passes == [4, 2]
    passes.clear()
    small = engine.with_recipe(smoke("evaluation.clients_per_batch=4", "evaluation.batch_size=16"))
    near(dict(small.evaluate_clients(enumerate(rows))), scores)
    assert passes == [16 // max(sizes)] * (6 * max(sizes) // 16)


def test_mixtures_and_known_scores_are_left_out_of_the_pass(smoke, passes):
    engine = LocalEngine.from_recipe(smoke("evaluation.clients_per_batch=4", ROOM))
    rows = rows_of(engine)
    known = dict(engine.evaluate_clients([(1, rows[1])]))
    mixture = Mixture(torch.stack(rows[:2]), torch.tensor([0.5, 0.5]))
    served = [(0, rows[0]), (1, rows[1]), (2, rows[2]), (3, mixture), (4, rows[4])]
    passes.clear()
    assert dict(engine.evaluate_clients(served))[1] == known[1]
    assert passes == [2, 1, 1]


def test_models_are_served_as_they_are_needed(smoke):
    engine = LocalEngine.from_recipe(smoke("evaluation.clients_per_batch=2", ROOM))
    rows, asked = rows_of(engine), []

    def served():
        for client, row in enumerate(rows):
            asked.append(client)
            yield client, row

    scores = engine.evaluate_clients(served())
    assert next(scores)[0] == 0
    assert asked == [0, 1]
    assert [client for client, _ in scores] == [1, 2, 3, 4, 5]


def test_a_client_that_fails_in_a_shared_pass_is_named(smoke, monkeypatch, caplog):
    engine = LocalEngine.from_recipe(smoke("evaluation.clients_per_batch=4", ROOM))
    rows, culprit, collate = rows_of(engine), engine.clients[2], engine.task.collate
    expected = dict(LocalEngine.from_recipe(smoke()).evaluate_clients(enumerate(rows)))

    def fail(examples, indices):
        if np.isin(indices, culprit.test).any():
            raise ZeroDivisionError("no luck")
        return collate(examples, indices)

    monkeypatch.setattr(engine.task, "collate", fail)
    scores = dict(engine.evaluate_clients(enumerate(rows), 3))
    error = scores.pop(2)
    assert isinstance(error, ClientError)
    assert error.client == culprit.name
    expected.pop(2)
    near(scores, expected)
    assert (
        "4 clients are evaluated one at a time, because their joint pass failed: "
        "ZeroDivisionError: no luck"
    ) in caplog.text


def test_out_of_memory_reduces_the_clients_per_pass(smoke, monkeypatch, caplog, passes):
    engine = LocalEngine.from_recipe(smoke("evaluation.clients_per_batch=4", ROOM))
    compute = scoring.evaluate_together

    def small(runtime, rows, parts):
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return compute(runtime, rows, parts)

    monkeypatch.setattr(scoring, "evaluate_together", small)
    scores = dict(engine.evaluate_clients(enumerate(rows_of(engine))))
    assert sorted(scores) == list(range(6))
    assert passes == [1, 1, 1, 1, 2]
    assert "the limit of clients that are evaluated in one pass is now 2" in caplog.text

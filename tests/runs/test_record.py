"""Scores over clients: their mean, their worst tenth, and the single worst client."""

import math

import pytest

from fedmerge_peft.runs.record import Scores, restore_scores, worst_tenth


@pytest.mark.parametrize(
    ("clients", "worst"), [(1, 0.0), (10, 0.0), (11, 0.5), (20, 0.5), (21, 1.0), (100, 4.5)]
)
def test_the_worst_tenth_is_rounded_up(clients, worst):
    assert worst_tenth("accuracy", range(clients)) == worst
    assert worst_tenth("perplexity", range(clients)) == clients - 1 - worst


def test_the_worst_tenth_of_no_clients_is_undefined():
    assert math.isnan(worst_tenth("accuracy", []))


def test_scores_name_the_worst_client_beside_the_worst_tenth():
    clients = {f"client {number}": {"test_accuracy": number / 20} for number in range(20)}
    scores = Scores.of("accuracy", clients)
    assert scores.worst == pytest.approx(0.025)
    assert (scores.worst_client, scores.worst_client_score) == ("client 0", 0.0)
    losses = {name: {"test_perplexity": -each["test_accuracy"]} for name, each in clients.items()}
    assert Scores.of("perplexity", losses).worst == pytest.approx(-0.025)
    assert Scores.of("perplexity", losses).worst_client == "client 0"


def test_a_clients_loss_that_is_not_a_number_survives_the_file():
    """A mean validation loss of null is none, and a client's is nan."""
    scores = {"metric": "test_accuracy", "validation_loss": None}
    document = {"served": {**scores, "clients": {"a": {"validation_loss": None, "x": "Infinity"}}}}
    served = restore_scores(document)["served"]
    assert served["validation_loss"] is None
    assert math.isnan(served["clients"]["a"]["validation_loss"])
    assert served["clients"]["a"]["x"] == math.inf

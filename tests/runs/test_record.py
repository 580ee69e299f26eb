"""Scores over clients: their mean, their worst tenth, and the single worst client."""

import math

import pytest

from fedmerge_peft.runs.record import Scores, worst_tenth


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

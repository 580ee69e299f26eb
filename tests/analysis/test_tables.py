"""The tables that a terminal shows after a run."""

import io
from types import SimpleNamespace

import pandas
import pytest
from rich.console import Console

from fedmerge_peft.analysis import weights_table
from fedmerge_peft.analysis.tables import scores_table


class WithWeights:
    """The parts of a run that the table reads."""

    def __init__(self, clients, adapters):
        names = [f"amazon_books-{client}" for client in range(clients)]
        self.weights = pandas.DataFrame([[1 / adapters] * adapters] * clients, index=names)


class WithScores:
    """A finished run of three clients, ``a`` to ``c``, without baselines."""

    def __init__(self, groups):
        self.clients = pandas.DataFrame({"group": groups, "train": 9, "test": 4}, index=list("abc"))
        scores = {name: {"test_accuracy": 0.5} for name in "abc"}
        served = {
            "metric": "test_accuracy",
            "mean": 0.5,
            "worst_client_score": 0.5,
            "clients": scores,
        }
        self.summary = {"final": {"served": served}}
        self.baselines = {}
        self.recipe = SimpleNamespace(
            strategy=SimpleNamespace(name="fedmerge"), task=SimpleNamespace(metrics=["accuracy"])
        )


def shown(table, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("adapters", [1, 5, 6, 7, 12, 15, 32])
def test_weights_are_legible_in_eighty_columns(adapters):
    text = shown(weights_table(WithWeights(3, adapters)))
    assert "…" not in text
    row = next(line for line in text.splitlines() if "amazon_books-2" in line)
    numbers = [word for word in row.split()[1:] if word.replace(".", "").isdigit()]
    assert len(numbers) == min(adapters, 15)
    assert ("17 more adapters" in text) == (adapters == 32)


def test_long_tables_are_cut_with_a_line_that_counts_the_rest():
    assert "... and 160 more" in shown(weights_table(WithWeights(200, 3)))


def test_names_from_data_are_neither_markup_nor_control_characters():
    run = WithWeights(1, 2)
    run.weights.index = ["[red]x[/] \x1b[2J"]
    text = shown(weights_table(run))
    assert "[red]x[/]" in text
    assert "\x1b" not in text


def test_the_column_of_groups_is_left_out_where_each_client_is_its_own_group():
    assert shown(scores_table(WithScores(["north", "south", "north"]))).count("north") == 2
    alone = shown(scores_table(WithScores(["a", "b", "c"])))
    assert "group" not in alone
    assert [line.split()[:3] for line in alone.splitlines() if line.startswith("  a ")] == [
        ["a", "9", "4"]
    ]


@pytest.mark.parametrize("scores", [{}, {"validation_loss": 1.0}, None])
def test_a_client_without_a_score_has_a_dash(scores):
    run = WithScores(["", "", ""])
    clients = run.summary["final"]["served"]["clients"]
    if scores is None:
        del clients["b"]
    else:
        clients["b"] = scores
    (row,) = [line for line in shown(scores_table(run)).splitlines() if line.split()[:1] == ["b"]]
    assert row.split() == ["b", "9", "4", "–"]

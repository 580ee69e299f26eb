"""Progress in notebooks: bars within a round, the last rounds, and a live curve."""

import sys
import types

import pytest

from fedmerge_peft import federate, sweep
from fedmerge_peft.errors import SweepError
from fedmerge_peft.federation.notebook_progress import NotebookProgress, in_notebook


@pytest.fixture
def shown(monkeypatch):
    """The HTML that a notebook would show, one text for each update."""
    texts = []

    class Handle:
        def update(self, content):
            texts.append(content)

    def display(content, display_id):
        texts.append(content)
        return Handle()

    fake = types.ModuleType("IPython.display")
    fake.HTML, fake.display = str, display
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    return texts


def test_tests_are_no_notebook():
    assert not in_notebook()


def test_clients_rounds_and_scores_are_shown_as_they_come(
    shown, smoke, smoke_engine, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedmerge_peft.federation.notebook_progress._INTERVAL", 0)
    recipe = smoke("rounds=2", "baselines=[fedavg]")
    run = federate(recipe, tmp_path / "run", engine=smoke_engine, callbacks=[NotebookProgress()])
    clients = len(run.clients)
    places = [
        next(place for place, text in enumerate(shown) if part in text)
        for part in (
            "<b>fedmerge</b>",
            f"clients 1 of {clients}",
            f"clients {clients} of {clients}",
            "rounds 1 of 2",
            "rounds 2 of 2",
            "<b>fedavg</b>",
        )
    ]
    assert places == sorted(places)
    last = shown[-1]
    assert last.count("<polyline") == 2
    assert f"{run.baselines['fedavg'].records[1]['served']['mean']:.3f}" in last
    assert "clients" not in last.partition("<table>")[0].partition("</style>")[2]


def test_a_sweep_shows_its_runs_and_the_progress_of_the_present_one(
    shown, smoke, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedmerge_peft.federation.notebook_progress.in_notebook", lambda: True)
    small = ["rounds=1", "baselines=[]", "data.partition={scheme: iid, clients: 2}"]
    recipes = {
        "first": smoke(*small),
        "second": smoke(*small, "seed=1"),
        "wrong": smoke(*small, "data.filter.provider=[nobody]"),
    }
    with pytest.raises(SweepError):
        sweep(recipes, tmp_path)
    first, second, wrong = (
        next(text for text in shown if f"runs {ended} of 3" in text) for ended in (1, 2, 3)
    )
    assert "<td>first</td>" in first
    assert "rounds 1 of 1" not in first  # no run is in progress
    assert any("second" in text and "rounds 0 of 1" in text for text in shown)
    assert "<td>second</td>" in second
    assert "failed: " in wrong

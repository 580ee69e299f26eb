"""``tools/answers.py``, which ends ``make chat``, on a tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fedmerge_peft import Recipe, federate, load_run
from fedmerge_peft.data import federate_data
from fedmerge_peft.serving.predictor import Predictor

PROGRAM = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "answers.py"))
SMALL = [
    "backbone.model=tiny:llama",
    "lora={r: 2, target_modules: all-linear}",
    "task.max_length=96",
    "task.max_new_tokens=6",
    "data.max_train=2",
    "data.max_test=4",
    "rounds=1",
    "strategy={name: fedmerge, adapters: 2, start: independent}",
    "training.device=cpu",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return federate(Recipe.load("assistants", SMALL), tmp_path_factory.mktemp("run") / "run")


def test_written_answers_follow_the_rule_of_their_client_and_no_other(run):
    recipe, rules = run.recipe, run.clients["group"]
    table = federate_data(recipe.data, None, recipe.seed)
    written = {
        client.name: [table.table[row]["messages"][1]["content"] for row in client.test.tolist()]
        for client in table.clients
    }
    assert PROGRAM["share_by_rule"](written, rules) == 1
    (first, *_), (*_, last) = rules.index, rules.index
    assert rules[first] != rules[last]
    mixed = {first: [*written[first][:3], *written[last][:1]]}
    assert PROGRAM["share_by_rule"](mixed, rules) == 0.75
    assert PROGRAM["share_by_rule"]({first: written[last]}, rules) == 0


def test_the_questions_are_those_of_test_chats(run):
    asked = PROGRAM["first_questions"](run, 2)
    assert [*asked] == list(run.client_names)
    data = federate_data(run.recipe.data, None, run.recipe.seed)
    tested = {
        data.table[row]["messages"][0]["content"]
        for client in data.clients
        for row in client.test.tolist()
    }
    for chats in asked.values():
        assert [[turn["role"] for turn in chat] for chat in chats] == [["user"], ["user"]]
        assert {chat[0]["content"] for chat in chats} <= tested


def test_the_program_prints_and_writes_scores_of_all_clients(run, tmp_path, monkeypatch, capsys):
    sizes = []
    whole = Predictor._predict
    monkeypatch.setattr(
        Predictor,
        "_predict",
        lambda self, examples, chunks: (sizes.append(len(chunks)), whole(self, examples, chunks))[
            1
        ],
    )
    monkeypatch.setattr("sys.argv", ["answers.py", str(run.path), "--page", str(tmp_path / "page")])
    PROGRAM["main"]()
    # 3 questions for each of 8 clients, and one more for 3 clients; FedMerge, then FedAvg
    assert sizes == [8, 8, 8, 3] * 2
    out = capsys.readouterr().out
    assert PROGRAM["QUESTION"] in out
    assert "by the house rule, of 24 answers" in out
    average = load_run(run.path / "baselines" / "fedavg")
    page = (tmp_path / "page").read_text()
    for method, of in (("FedMerge", run), ("FedAvg", average)):
        clients = of.summary["final"]["served"]["clients"].values()
        mean = sum(each["test_perplexity"] for each in clients) / 8
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {method} |"))
        assert f"| {mean:.2f} |" in line
        assert line.endswith("| 0.0 % |")  # an untrained model knows no rule

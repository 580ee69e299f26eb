"""Whole runs in which clients fail."""

import json
import random

import pytest

from fedmerge_peft import Callback, ClientError, TooFewClientsError, federate, load_run, resume
from fedmerge_peft.engines import scoring
from fedmerge_peft.util.seeds import derive

SKIP = ["clients.failures=skip", "rounds=5", "evaluation.every=5"]


@pytest.fixture
def unreliable(smoke_engine, monkeypatch):
    """``unreliable(rate)``: make replies fail at random, by a fixed seed.

    Return the failures by (round, client).
    """

    def make(rate):
        happened = {}
        train_clients = smoke_engine.train_clients

        def fail(number, assignments):
            for plan, answer in train_clients(number, assignments):
                name = smoke_engine.clients[answer.client].name
                dice = random.Random(derive(7, "fault", number, name))
                if dice.random() < rate:
                    answer = happened[number, name] = dice.choice(
                        [ClientError(name, number, "lost"), None, NAN(answer)]
                    )
                if answer is not None:
                    yield plan, answer

        monkeypatch.setattr(smoke_engine, "train_clients", fail)
        return happened

    return make


def NAN(reply):  # noqa: N802
    from dataclasses import replace

    return replace(reply, deltas=reply.deltas * float("nan"))


@pytest.mark.parametrize("strategy", ["fedmerge", "ditto", "fesem"])
def test_with_a_fifth_of_the_replies_failing_a_run_ends_and_every_failure_is_accounted_for(
    smoke, smoke_engine, unreliable, tmp_path, strategy
):
    happened = unreliable(0.2)
    run = federate(smoke(f"strategy={strategy}", *SKIP), tmp_path / "run", engine=smoke_engine)
    recorded = {(record["round"], name) for record in run.records for name in record["failures"]}
    assert recorded == happened.keys()
    assert len(recorded) >= 3
    everyone = {client.name for client in smoke_engine.clients}
    assert all({*record["clients"], *record["failures"]} == everyone for record in run.records)
    assert sum(run.summary["failures"].values()) == len(recorded)
    assert run.soup.rows.isfinite().all()


def test_a_run_with_failures_resumes_to_the_same_bits(
    smoke, smoke_engine, unreliable, tmp_path, left_behind
):
    unreliable(0.2)
    federate(smoke(*SKIP), tmp_path / "whole", engine=smoke_engine)

    def interrupt(record):
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(
            smoke(*SKIP),
            tmp_path / "parts",
            engine=smoke_engine,
            callbacks=[Callback(on_round=interrupt)],
        )
    resume(tmp_path / "parts", engine=smoke_engine)
    assert left_behind(tmp_path / "parts") == left_behind(tmp_path / "whole")


def test_a_run_that_lost_too_many_clients_resumes_when_they_are_back(
    smoke, smoke_engine, tmp_path, monkeypatch, left_behind
):
    recipe = smoke(*SKIP, "clients.min_clients=3")
    federate(recipe, tmp_path / "whole", engine=smoke_engine)
    train_clients = smoke_engine.train_clients
    with monkeypatch.context() as patch:
        patch.setattr(
            smoke_engine,
            "train_clients",
            lambda number, assignments: list(train_clients(number, assignments))[
                : 6 if number < 3 else 2
            ],
        )
        with pytest.raises(TooFewClientsError, match="round 3: 2 of 6 clients sent valid replies"):
            federate(recipe, tmp_path / "parts", engine=smoke_engine)
    assert len(load_run(tmp_path / "parts").records) == 2
    resume(tmp_path / "parts", engine=smoke_engine)
    assert left_behind(tmp_path / "parts") == left_behind(tmp_path / "whole")


def test_a_client_that_cannot_be_evaluated_is_missing_from_the_final_scores_only(
    smoke, smoke_engine, tmp_path, monkeypatch
):
    evaluate, culprit = scoring.evaluate_parts, smoke_engine.clients[1]
    smoke_engine.clear_caches()

    def fail(runtime, served, parts, batch_size):
        if any(rows is culprit.test for rows in parts):
            raise ZeroDivisionError("no luck")
        return evaluate(runtime, served, parts, batch_size)

    monkeypatch.setattr(scoring, "evaluate_parts", fail)
    run = federate(smoke("clients.failures=skip"), tmp_path / "run", engine=smoke_engine)
    assert run.summary["failures"] == {culprit.name: 2}
    assert culprit.name not in run.summary["final"]["served"]["clients"]
    assert len(run.summary["final"]["served"]["clients"]) == 5


def test_a_client_beyond_the_time_limit_is_left_out(smoke, smoke_engine, tmp_path):
    recipe = smoke("clients.timeout=1e-9", "clients.failures=skip")
    with pytest.raises(TooFewClientsError, match=r"clients\.timeout is 1e-09 s"):
        federate(recipe, tmp_path / "run", engine=smoke_engine)


def test_the_command_line_prints_the_command_that_resumes(tmp_path, capsys):
    from fedmerge_peft.cli import main

    small = [
        "data.max_train=4",
        "data.max_test=2",
        "training.device=cpu",
        "baselines=[]",
        "clients.timeout=1e-9",
    ]
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "run",
                "smoke",
                *small,
                "clients.failures=skip",
                "--out",
                str(tmp_path / "run"),
                "--quiet",
            ]
        )
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert "0 of 12 clients sent valid replies" in output
    assert f"fedmerge resume {tmp_path / 'run'}" in output
    assert "Traceback" not in output


def test_records_of_runs_without_failures_have_no_failures(smoke, smoke_engine, tmp_path):
    run = federate(smoke(), tmp_path / "run", engine=smoke_engine)
    assert all(
        json.loads(line)["failures"] == {}
        for line in (run.path / "metrics.jsonl").read_text().splitlines()
    )

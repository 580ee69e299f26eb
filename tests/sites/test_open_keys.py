"""Sites train with the learning rate and epochs that the server chooses, if the kit leaves them."""

import json

import pytest
import torch

from fedmerge_peft import Run, federate
from fedmerge_peft.errors import RefusedError, WireError
from fedmerge_peft.federation import tuning
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.training.hyperparameters import Hyperparameters

OPEN = ["strategy=fedavg", "training.learning_rate=auto", "training.epochs=auto", "rounds=2"]


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_sites_train_with_the_values_that_the_server_chooses(
    smoke, federation_of, connect, tmp_path, monkeypatch, validation
):
    monkeypatch.setattr(tuning, "_STEPS", 1)
    recipe = smoke(*OPEN, f"data.validation_fraction={validation}", "training.clients_per_batch=1")
    kit, trainers = federation_of(recipe, 2)
    events = []
    outcome = run_job(kit, connect(trainers), lambda: None, events.append)
    assert outcome.state == "ended", outcome.error
    run, local = Run.open(kit / "run"), federate(recipe, tmp_path / "local")
    for one in (run, local):
        one.decisions["learning_rate"].pop("seconds")
    assert run.decisions == local.decisions
    assert torch.equal(run.soup.rows, local.soup.rows)
    assert any(line.startswith("learning rate 0.") for line in events)
    audit = (trainers["site-1"].kit / "audit.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, audit) if entry["kind"] == "train"]
    assert any(entry["round"] == 0 for entry in entries)  # the trials


def test_a_site_that_fails_is_left_out_of_the_range_test(
    smoke, federation_of, connect, monkeypatch
):
    monkeypatch.setattr(tuning, "_STEPS", 1)
    recipe = smoke(*OPEN, "clients.failures=skip")
    kit, trainers = federation_of(recipe, 2)
    transport = connect(trainers)

    def drop(site, payload, reply):
        return "lost" if site == "site-2" and Message.from_bytes(payload).kind == "train" else reply

    transport.alter = drop
    outcome = run_job(kit, transport, lambda: None, lambda line: None)
    assert outcome.state == "ended", outcome.error
    (trial, *_) = Run.open(kit / "run").decisions["learning_rate"]["trials"]
    names = {client.name for client in trainers["site-1"].data.clients}
    assert 0 < len(trial["training_loss"]) <= len(names)
    assert set(trial["training_loss"]) <= names


@pytest.mark.parametrize(
    ("overrides", "values", "message"),
    [
        ([], Hyperparameters(0.5), "training.learning_rate is 0.001 in the kit's recipe"),
        ([], Hyperparameters(None, 2), "training.epochs is 1 in the kit's recipe"),
        (OPEN, Hyperparameters(None, 2), "training.learning_rate is auto in the kit's recipe"),
        (OPEN, Hyperparameters(0.5), "training.epochs is auto in the kit's recipe"),
        ([*OPEN, "training.steps=2"], Hyperparameters(0.5), None),
        (OPEN, Hyperparameters(0.5, 2), None),
        ([], Hyperparameters(), None),
    ],
)
def test_a_site_accepts_values_for_open_keys_only(smoke, federation_of, overrides, values, message):
    _, trainers = federation_of(smoke(*overrides), 1)
    check = trainers["site-1"]._check_hyperparameters
    if message is None:
        check(values)
        return
    with pytest.raises((RefusedError, WireError), match=message):
        check(values)

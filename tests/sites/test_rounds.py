"""A federation across sites equals the same recipe on one machine, bit by bit."""

import json

import pytest
import torch

from fedmerge_peft import Run, federate
from fedmerge_peft.sites.server.job import run_job

LOCAL = "training.clients_per_batch=1"
"""Sites train one client at a time, so that each client has its own dropout masks."""


def assert_same_state(run, expected):
    (soup, weights), (expected_soup, expected_weights) = run.state(), expected.state()
    assert torch.equal(soup.rows, expected_soup.rows)
    assert soup.base.keys() == expected_soup.base.keys()
    assert all(torch.equal(soup.base[name], expected_soup.base[name]) for name in soup.base)
    assert torch.equal(weights, expected_weights)


def without_seconds(record):
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.mark.parametrize(
    "strategy",
    [
        "strategy={name: fedmerge, adapters: 3, start: warm, warm_rounds: 1}",
        "strategy=ditto",
        "strategy=fedrep",
        "strategy={name: ifca, adapters: 2}",
        "strategy={name: fedem, adapters: 2}",
        "strategy=flora",
        "strategy=ffa_lora",
    ],
    ids=lambda text: text.split("name: ")[-1].split(",")[0].removeprefix("strategy="),
)
def test_a_federation_of_three_sites_equals_one_machine(
    strategy, smoke, federation_of, connect, tmp_path
):
    recipe = smoke(strategy, LOCAL, "lora.dropout=0.1")
    kit, trainers = federation_of(recipe, 3)
    outcome = run_job(kit, connect(trainers), lambda: None, lambda line: None)
    assert outcome.state == "ended", outcome.error
    local = federate(recipe, tmp_path / "local")
    run = Run.open(kit / "run")
    assert_same_state(run, local)
    assert [without_seconds(record) for record in run.records] == [
        without_seconds(record) for record in local.records
    ]
    assert run.summary["final"] == local.summary["final"]
    for name in ("clients.json", "labels.json", "task.json", "adapter_config.json"):
        assert json.loads((run.path / name).read_text()) == json.loads(
            (local.path / name).read_text()
        )


def test_sites_compare_groups_with_one_adapter(smoke, federation_of, connect, tmp_path):
    """In the rounds after the grouping, sites receive two adapters and report three losses."""
    recipe = smoke(
        "strategy={name: fedmerge, warm_rounds: 1}",
        "data.max_train=14",
        "data.max_test=3",
        "data.validation_fraction=0.3",
        "training.learning_rate=0.02",
        "rounds=4",
        LOCAL,
    )
    kit, trainers = federation_of(recipe, 3)
    outcome = run_job(kit, connect(trainers), lambda: None, lambda line: None)
    assert outcome.state == "ended", outcome.error
    run, local = Run.open(kit / "run"), federate(recipe, tmp_path / "local")
    assert_same_state(run, local)
    assert [without_seconds(record) for record in run.records] == [
        without_seconds(record) for record in local.records
    ]
    assert any(record["bytes_down"] == 2 * record["bytes_up"] for record in run.records)
    decisions = [text for record in run.records for text in record["decisions"]]
    assert any("with one adapter" in text for text in decisions)

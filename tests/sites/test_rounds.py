"""A federation across sites gives what the same recipe gives on one machine, bit by bit."""

import json

import pytest
import torch

from fedmerge_peft import Run, federate
from fedmerge_peft.sites.server.job import run_job

LOCAL = "training.clients_per_batch=1"
"""Sites train one client at a time, so that dropout masks are each client's own."""


def go(kit, transport, stop=lambda: None):
    told = []
    outcome = run_job(kit, transport, stop, told.append)
    return outcome, told


def same(one, two):
    soup, weights = one.state()
    others = two.state()
    assert torch.equal(soup.rows, others[0].rows)
    assert soup.base.keys() == others[0].base.keys()
    assert all(torch.equal(soup.base[name], others[0].base[name]) for name in soup.base)
    assert torch.equal(weights, others[1])


def timeless(record):
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
    strategy, smoke, federation_of, loop, tmp_path
):
    recipe = smoke(strategy, LOCAL, "lora.dropout=0.1")
    kit, trainers = federation_of(recipe, 3)
    outcome, _ = go(kit, loop(trainers))
    assert outcome.state == "ended", outcome.error
    local = federate(recipe, tmp_path / "local")
    run = Run.open(kit / "run")
    same(run, local)
    assert [timeless(record) for record in run.records] == [
        timeless(record) for record in local.records
    ]
    assert run.summary["final"] == local.summary["final"]
    for name in ("clients.json", "labels.json", "task.json", "adapter_config.json"):
        assert json.loads((run.path / name).read_text()) == json.loads(
            (local.path / name).read_text()
        )

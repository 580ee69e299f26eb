"""Federations of separate processes over TLS equal one machine, and survive killed processes."""

import json
import os
import signal
import time

import pytest
import torch

from fedmerge_peft import Recipe, Run
from sites.processes import SMALL, fedmerge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and sockets"),
    pytest.mark.usefixtures("one_thread"),
]


def assert_same_state(run, expected):
    """Compare the soups and weights of two runs bit by bit."""
    (soup, weights), (expected_soup, expected_weights) = run.state(), expected.state()
    assert torch.equal(soup.rows, expected_soup.rows)
    assert torch.equal(weights, expected_weights)


def test_a_rehearsal_of_three_sites_equals_one_machine(tmp_path):
    small = [*SMALL, "lora.dropout=0.1", "rounds=3"]
    rehearsal = fedmerge(
        "federate", "rehearse", "smoke", *small, "--sites", 3, "--out", tmp_path / "out"
    )
    assert "round 3/3" in rehearsal.stdout
    small.append("training.clients_per_batch=1")
    local = Recipe.load("smoke", small)
    fedmerge("run", "smoke", *small, "--out", tmp_path / "local", "--quiet")
    run = Run.open(tmp_path / "out" / "server" / "run")
    assert_same_state(run, Run.open(tmp_path / "local"))
    assert run.recipe.rounds == local.rounds == len(run.records)
    for site in (1, 2, 3):
        kit = tmp_path / "out" / "sites" / f"site-{site}"
        entries = [json.loads(line) for line in (kit / "audit.jsonl").read_text().splitlines()]
        kinds = {entry["kind"] for entry in entries}
        assert kinds == {"enroll", "open", "train", "evaluate", "adapter"}
        assert all(entry["update_norm"] > 0 for entry in entries if entry["kind"] == "train")
    adapters = sorted(
        path.parent.name
        for path in (tmp_path / "out").glob("sites/*/adapters/*/adapter_model.safetensors")
    )
    assert adapters == sorted(run.client_names)


def failed(run, clients, why=""):
    """Return a condition: one of these clients failed in a later round, for this reason."""
    done = len(run.records)

    def failed_since():
        reasons = (
            record["failures"].get(client) for record in run.records[done:] for client in clients
        )
        return any(reason is not None and why in reason for reason in reasons)

    return failed_since


def test_kills_late_sites_and_missed_deadlines_cost_no_completed_round(federation_processes):
    """Three sites of two clients: the third is late; trainer, site and server are killed."""
    recipe = Recipe.load(
        "smoke", [*SMALL, "rounds=2000", "evaluation.every=4000", "evaluation.finetuned=false"]
    )
    processes = federation_processes(recipe, 3, segment=1500, deadline=8)
    processes.start("server", "site-1", "site-2")
    processes.run("--wait", 5, "--min-sites", 2, "--reconnect-timeout", 120)
    processes.wait_until(lambda: processes.rounds() >= 2)
    run = Run.open(processes.out / "server" / "run")
    north, middle, late = (
        processes.federation.sites[site] for site in ("site-1", "site-2", "site-3")
    )
    assert set(run.records[1]["clients"]) == {*north, *middle}
    assert all("takes no part" in run.records[1]["failures"][client] for client in late)

    processes.wait_randomly()
    # ---- a trainer dies, and is restarted within the same job
    os.kill(killed := processes.trainer("site-1"), signal.SIGKILL)
    processes.wait_until(lambda: processes.trainer("site-1") not in (killed, None))
    # no client fails if the kill came while the server waited for the other site
    before = len(run.records)
    processes.wait_until(
        lambda: any(set(north) <= set(record["clients"]) for record in run.records[before + 1 :])
    )

    # ---- a trainer hangs; its site fails in that round
    timed_out = failed(run, middle, "did not reply within")
    processes.wait_randomly()
    os.kill(stopped := processes.trainer("site-2"), signal.SIGSTOP)
    processes.wait_until(timed_out)
    os.kill(stopped, signal.SIGCONT)
    processes.wait_until(lambda: set(middle) <= set(run.records[-1]["clients"]))

    # ---- a site connects late
    processes.start("site-3")
    processes.wait_until(lambda: set(late) <= set(run.records[-1]["clients"]))

    # ---- a whole site dies, and is restarted
    processes.wait_randomly()
    processes.kill("site-2")
    disconnected = failed(run, middle)
    processes.start("site-2")
    processes.wait_until(disconnected)
    processes.wait_until(lambda: set(middle) <= set(run.records[-1]["clients"]))

    # ---- the server dies, and is restarted; all sites reconnect
    processes.wait_randomly()
    before = len(run.records)
    processes.kill("server")
    processes.start("server")
    processes.wait_until(
        lambda: len(run.records) > before + 1 and len(run.records[-1]["clients"]) == 6
    )
    records = run.records
    assert [record["round"] for record in records] == list(range(1, len(records) + 1))
    status = fedmerge("federate", "status", processes.out).stdout
    assert status.count("connected, in the running job") == 3
    fedmerge("federate", "stop", processes.out)
    assert processes.operator.wait(120) == 0
    assert "stopped: " in "".join(processes.lines)
    assert [train > 0 for train in run.clients["train"]] == [True] * 6


def test_a_site_with_another_authoritys_certificate_cannot_connect(federation_processes):
    """A site of another federation fails the TLS handshake, and its trainer sends nothing."""
    from fedmerge_peft.sites.rehearse import await_server

    recipe = Recipe.load("smoke", [*SMALL, "rounds=1"])
    ours = federation_processes(recipe, 2)
    theirs = federation_processes(recipe, 2, port=ours.federation.port)
    with (ours.out / "sites" / "site-1" / "site.yaml").open("a") as file:
        file.write("process: job\n")  # the accepted site trains in its job's process
    ours.start("server", "site-1")
    await_server(ours.federation, ours.children["server"])
    theirs.start("site-2")
    log = theirs.out / "sites" / "site-2" / "site.log"
    end = time.monotonic() + 60
    while time.monotonic() < end and "CERTIFICATE_VERIFY_FAILED" not in (
        log.read_text() if log.exists() else ""
    ):
        time.sleep(0.2)
    ours.run("--wait", 3)
    assert ours.operator.wait(300) == 0
    assert "sites: site-1; without site-2 (it is not connected)" in "".join(ours.lines)
    assert not (theirs.out / "sites" / "site-2" / "audit.jsonl").exists()
    assert "CERTIFICATE_VERIFY_FAILED" in log.read_text()

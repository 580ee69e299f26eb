"""Federations of separate processes over TLS equal one machine, and survive killed processes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fedmerge_peft import Recipe, Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and sockets"),
]

SMALL = [
    "data.max_train=4",
    "data.max_test=3",
    "data.filter.provider=[Alder, Birch]",
    "training.device=cpu",
    "baselines=[]",
]
FEDMERGE = [sys.executable, "-c", "from fedmerge_peft.cli import main; main()"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("NVFLARE_DEAD_CLIENT_GRACE_PERIOD", "3")


def fedmerge(*arguments, check=True):
    return subprocess.run(
        [*FEDMERGE, *map(str, arguments)], capture_output=True, text=True, check=check, timeout=600
    )


def assert_same_state(run, expected):
    """Compare the soups and weights of two runs bit by bit."""
    (soup, weights), (expected_soup, expected_weights) = run.state(), expected.state()
    assert torch.equal(soup.rows, expected_soup.rows)
    assert torch.equal(weights, expected_weights)


def test_a_rehearsal_of_three_sites_equals_one_machine(tmp_path):
    rehearsal = fedmerge(
        "federate",
        "rehearse",
        "smoke",
        *SMALL,
        "lora.dropout=0.1",
        "rounds=3",
        "--sites",
        3,
        "--out",
        tmp_path / "out",
    )
    assert "round 3/3" in rehearsal.stdout
    local = Recipe.load(
        "smoke", [*SMALL, "lora.dropout=0.1", "rounds=3", "training.clients_per_batch=1"]
    )
    fedmerge(
        "run",
        "smoke",
        *SMALL,
        "lora.dropout=0.1",
        "rounds=3",
        "training.clients_per_batch=1",
        "--out",
        tmp_path / "local",
        "--quiet",
    )
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


class FederationProcesses:
    """Prepared federation whose processes a test starts, kills and restarts."""

    def __init__(self, out, federation):
        self.out, self.federation = out, federation
        self.children = {}
        self.lines = []

    def start(self, *names):
        from fedmerge_peft.sites.rehearse import start_server, start_site

        for name in names:
            self.children[name] = (
                start_server(self.out) if name == "server" else start_site(self.out, name)
            )

    def run(self, *options):
        """Start ``fedmerge federate run``, whose output is collected in ``lines``."""
        command = [*FEDMERGE, "federate", "run", str(self.out), *map(str, options)]
        self.operator = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(self.operator.stdout), daemon=True
        )
        self.reader.start()

    def rounds(self):
        metrics = self.out / "server" / "run" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_until(self, condition, seconds=300):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "".join(self.lines)
            assert self.operator.poll() is None or condition(), "".join(self.lines)
            time.sleep(0.05)

    def trainer(self, site):
        """Return the id of a site's trainer process; None while there is none."""
        return next(
            (
                pid
                for pid in children_of(self.children[site].process.pid)
                if "trainer_process" in command_of(pid)
            ),
            None,
        )

    def wait_randomly(self):
        """Wait for up to two rounds, so that a kill hits a random phase of a round."""
        start, before = time.monotonic(), self.rounds()
        self.wait_until(lambda: self.rounds() > before)
        time.sleep(random.uniform(0, 2 * min(time.monotonic() - start, 2)))

    def kill(self, name):
        """Kill the command alone; its children must exit by themselves."""
        os.kill(self.children[name].process.pid, signal.SIGKILL)
        self.children.pop(name).process.wait()

    def stop(self):
        for process in self.children.values():
            process.stop()
        if hasattr(self, "operator"):
            self.operator.kill()
            self.operator.wait()
            self.reader.join()
            self.operator.stdout.close()


def failed(run, clients, why=""):
    """Return a condition: one of these clients failed in a later round, for this reason."""
    done = len(run.records)

    def failed_since():
        reasons = (
            record["failures"].get(client) for record in run.records[done:] for client in clients
        )
        return any(reason is not None and why in reason for reason in reasons)

    return failed_since


def children_of(parent):
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return children


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # the process has ended
        return ""


@pytest.fixture
def federation_processes(tmp_path):
    """``federation_processes(recipe, sites, **options)``: prepared, without running processes."""
    from fedmerge_peft.sites.rehearse import prepare_rehearsal

    created = []

    def make(recipe, sites, **options):
        out = tmp_path / f"federation-{len(created)}"
        created.append(FederationProcesses(out, prepare_rehearsal(recipe, sites, out, **options)))
        return created[-1]

    yield make
    for processes in created:
        processes.stop()


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
    assert [
        client["train"] > 0 for client in json.loads((run.path / "clients.json").read_text())
    ] == [True] * 6


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


@pytest.fixture
def networks():
    """Three network namespaces on a bridge: name and address for the server and two sites.

    Skips if the system does not allow them.
    """
    from shutil import which

    if sys.platform != "linux" or which("ip") is None:
        pytest.skip("needs Linux and ip (iproute2)")
    tag, number = f"fm{os.getpid() % 10000}", os.getpid() % 200 + 20
    spaces = [
        (f"{tag}-{part}", f"10.77.{number}.{last}")
        for part, last in (("server", 1), ("a", 2), ("b", 3))
    ]

    def ip(*arguments, check=True):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)

    try:
        ip("link", "add", f"{tag}-br", "type", "bridge")
        ip("link", "set", f"{tag}-br", "up")
        for last, (space, address) in enumerate(spaces):
            ip("netns", "add", space)
            ip(
                "link",
                "add",
                f"{tag}-v{last}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            ip("link", "set", f"{tag}-v{last}", "master", f"{tag}-br", "up")
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")
        yield spaces
    except subprocess.CalledProcessError as error:
        pytest.skip(
            f"this system does not allow network namespaces: {error.stderr.strip() or error}"
        )
    finally:
        for space, _ in spaces:
            ip("netns", "del", space, check=False)
        ip("link", "del", f"{tag}-br", check=False)


@pytest.fixture
def slow_line(networks):
    """``networks`` with the server behind a line of 1 Mbit/s; skips if not allowed."""
    line = ["rate", "1mbit", "burst", "64kb", "latency", "400ms"]
    try:
        subprocess.run(
            ["tc", "-n", networks[0][0], "qdisc", "add", "dev", "eth0", "root", "tbf", *line],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this system does not allow slow lines: {error}")
    return networks


def run_on(networks, federation_processes, monkeypatch, *overrides, **options):
    """Run a federation of two sites on separate networks to its end, and return it."""
    from fedmerge_peft.sites import rehearse

    (here, address), *others = networks
    processes = federation_processes(
        Recipe.load("smoke", [*SMALL, *overrides]), 2, host=address, port=8002, **options
    )
    program = rehearse._PROGRAM
    for name, space in (
        ("server", here),
        *zip(processes.federation.sites, (space for space, _ in others), strict=True),
    ):
        monkeypatch.setattr(rehearse, "_PROGRAM", ["ip", "netns", "exec", space, *program])
        processes.start(name)
    monkeypatch.setattr(sys.modules[__name__], "FEDMERGE", ["ip", "netns", "exec", here, *FEDMERGE])
    processes.run("--wait", 60, "--min-sites", 2)
    assert processes.operator.wait(300) == 0, "".join(processes.lines)
    processes.reader.join(10)
    return processes


def test_server_and_sites_on_separate_networks(networks, federation_processes, monkeypatch):
    """Nothing depends on localhost: server and sites have their own addresses and loopbacks."""
    run = Run.open(
        run_on(networks, federation_processes, monkeypatch, "rounds=2").out / "server" / "run"
    )
    assert run.ended
    assert [len(record["clients"]) for record in run.records] == [6, 6]


def test_a_slow_transfer_is_waited_for_and_sent_once(slow_line, federation_processes, monkeypatch):
    overrides = [
        "data.filter={organisation: [Fen Water, Harbour Clinic]}",
        "strategy=fedavg",
        "evaluation.finetuned=false",
        "lora.r=500",
    ]
    processes = run_on(
        slow_line, federation_processes, monkeypatch, *overrides, "rounds=1", deadline=120
    )
    run = Run.open(processes.out / "server" / "run")
    assert [len(record["clients"]) for record in run.records] == [2]
    assert "adapters sent to 2 of 2 clients" in "".join(processes.lines)
    statistics = subprocess.run(
        ["ip", "-s", "-j", "-n", slow_line[0][0], "link", "show", "eth0"],
        capture_output=True,
        check=True,
    ).stdout
    sent = json.loads(statistics)[0]["stats64"]["tx"]["bytes"]
    adapter = 4 * run.soup.layout.size
    # at 1 Mbit/s two adapters take longer than the 5 s after which FLARE's defaults send again
    assert adapter > 5 * 125_000 / 2
    # two clients: to train, to evaluate, to store; and overhead
    assert 6 * adapter < sent < 8 * adapter

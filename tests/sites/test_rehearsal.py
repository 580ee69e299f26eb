"""Federations as processes of their own, with TLS on both sides: what is true of one machine is true of them, whatever is killed."""

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
    pytest.mark.skipif(os.name != "posix", reason="processes and sockets as on Linux"),
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


def same(one, two):
    """Two runs' soups and weights, bit by bit."""
    (soup, weights), (other, others) = one.state(), two.state()
    assert torch.equal(soup.rows, other.rows)
    assert torch.equal(weights, others)


def test_a_rehearsal_of_three_sites_equals_one_machine(tmp_path):
    done = fedmerge(
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
    assert "round 3/3" in done.stdout
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
    same(run, Run.open(tmp_path / "local"))
    assert run.recipe.rounds == local.rounds == len(run.records)
    for site in (1, 2, 3):
        kit = tmp_path / "out" / "sites" / f"site-{site}"
        sent = [json.loads(line) for line in (kit / "audit.jsonl").read_text().splitlines()]
        assert {each["kind"] for each in sent} == {"enrol", "open", "train", "score", "adapter"}
        assert all(each["norm"] > 0 for each in sent if each["kind"] == "train")
    adapters = sorted(
        path.parent.name
        for path in (tmp_path / "out").glob("sites/*/adapters/*/adapter_model.safetensors")
    )
    assert adapters == sorted(run.client_names)


class Field:
    """A prepared federation whose processes a test starts, kills, and starts again."""

    def __init__(self, out, federation):
        self.out, self.federation = out, federation
        self.processes = {}
        self.lines = []

    def start(self, *names):
        from fedmerge_peft.sites.rehearse import start_server, start_site

        for name in names:
            self.processes[name] = (
                start_server(self.out) if name == "server" else start_site(self.out, name)
            )

    def run(self, *options):
        """``fedmerge federate run``, whose lines come into ``lines`` as it says them."""
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

    def until(self, condition, seconds=300):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "".join(self.lines)
            assert self.operator.poll() is None or condition(), "".join(self.lines)
            time.sleep(0.05)

    def after_rounds(self, more):
        """Wait until so many rounds more are on the disk."""
        wanted = self.rounds() + more
        self.until(lambda: self.rounds() >= wanted)

    def trainer(self, site):
        """The process that trains at a site; None while there is none."""
        return next(
            (
                pid
                for pid in children_of(self.processes[site].process.pid)
                if "trainer_process" in command_of(pid)
            ),
            None,
        )

    def at_some_moment(self):
        """Wait for up to the time of two rounds: whatever is killed next, it is not always in the middle of the same thing."""
        start, before = time.monotonic(), self.rounds()
        self.until(lambda: self.rounds() > before)
        time.sleep(random.uniform(0, 2 * min(time.monotonic() - start, 2)))

    def kill(self, name):
        """SIGKILL of the command alone: what it started has to end by itself."""
        os.kill(self.processes[name].process.pid, signal.SIGKILL)
        self.processes.pop(name).process.wait()

    def end(self):
        for process in self.processes.values():
            process.end()
        if hasattr(self, "operator"):
            self.operator.kill()
            self.operator.wait()
            self.reader.join()
            self.operator.stdout.close()


def failed(run, clients, why=""):
    """Whether one of these clients failed, for this reason, in a round after those that are done now; to be asked later."""
    done = len(run.records)

    def since():
        found = (
            record["failures"].get(client) for record in run.records[done:] for client in clients
        )
        return any(reason is not None and why in reason for reason in found)

    return since


def children_of(parent):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has ended
        return ""


@pytest.fixture
def field(tmp_path):
    """``field(recipe, sites, **facts)``: a prepared federation on this machine, nothing of it running."""
    from fedmerge_peft.sites.rehearse import rehearsal

    fields = []

    def make(recipe, sites, **facts):
        fields.append(
            Field(
                tmp_path / f"field-{len(fields)}",
                rehearsal(recipe, sites, tmp_path / f"field-{len(fields)}", **facts),
            )
        )
        return fields[-1]

    yield make
    for each in fields:
        each.end()


def test_kills_late_comers_and_missed_deadlines_cost_no_round_that_was_done(field, tmp_path):
    """Three sites of two clients each: the third comes late, and a trainer, a site and the server are killed at a random moment."""
    recipe = Recipe.load(
        "smoke", [*SMALL, "rounds=2000", "evaluation.every=4000", "evaluation.finetuned=false"]
    )
    there = field(recipe, 3, segment=1500, deadline=8)
    there.start("server", "site-1", "site-2")
    there.run("--wait", 5, "--least", 2, "--patience", 120)
    there.until(lambda: there.rounds() >= 2)
    run = Run.open(there.out / "server" / "run")
    north, middle, late = (there.federation.sites[site] for site in ("site-1", "site-2", "site-3"))
    assert set(run.records[1]["clients"]) == {*north, *middle}
    assert all("takes no part" in run.records[1]["failures"][client] for client in late)

    there.at_some_moment()
    os.kill(
        died := there.trainer("site-1"), signal.SIGKILL
    )  # ---- a trainer dies, and is back within the same job
    there.until(lambda: there.trainer("site-1") not in (died, None))
    before = len(
        run.records
    )  # nobody has failed if it was killed while the other site was waited for
    there.until(
        lambda: any(set(north) <= set(record["clients"]) for record in run.records[before + 1 :])
    )

    hung = failed(run, middle, "did not answer within")
    there.at_some_moment()
    os.kill(
        stopped := there.trainer("site-2"), signal.SIGSTOP
    )  # ---- a trainer hangs: it costs its site that round
    there.until(hung)
    os.kill(stopped, signal.SIGCONT)
    there.until(lambda: set(middle) <= set(run.records[-1]["clients"]))

    there.start("site-3")  # ---- a site comes late
    there.until(lambda: set(late) <= set(run.records[-1]["clients"]))
    there.at_some_moment()
    there.kill("site-2")  # ---- a whole site dies, and is started again
    gone = failed(run, middle)
    there.start("site-2")
    there.until(gone)
    there.until(lambda: set(middle) <= set(run.records[-1]["clients"]))

    there.at_some_moment()
    before = len(run.records)
    there.kill("server")  # ---- the server dies, and is started again
    there.start("server")
    there.until(
        lambda: len(run.records) > before + 1 and len(run.records[-1]["clients"]) == 6
    )  # all sites have found it again
    records = run.records
    assert [record["round"] for record in records] == list(range(1, len(records) + 1))
    said = fedmerge("federate", "status", there.out).stdout
    assert said.count("connected, in the running job") == 3
    fedmerge("federate", "stop", there.out)
    assert there.operator.wait(120) == 0
    assert "stopped: " in "".join(there.lines)
    assert [
        client["train"] > 0 for client in json.loads((run.path / "clients.json").read_text())
    ] == [True] * 6


def test_a_certificate_of_another_authority_is_not_let_in(field):
    """A site of another federation, sent to this server's port: it never gets past the handshake, and nothing of it is there."""
    from fedmerge_peft.sites.rehearse import await_server

    recipe = Recipe.load("smoke", [*SMALL, "rounds=1"])
    ours = field(recipe, 2)
    theirs = field(recipe, 2, port=ours.federation.port)
    with (ours.out / "sites" / "site-1" / "site.yaml").open("a") as file:
        file.write("process: job\n")  # the site that is let in trains in its job's own process
    ours.start("server", "site-1")
    await_server(ours.federation, ours.processes["server"])
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
    """Three network namespaces on one bridge: name and address of the server's and two sites'. Skips where there can be none."""
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
    """The same, the server behind a line of 1 Mbit/s. Skips where there can be none."""
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


def ended_on(networks, field, monkeypatch, *overrides, **facts):
    """A federation of two sites whose server and sites are on networks of their own, once it has ended."""
    from fedmerge_peft.sites import rehearse

    (here, address), *others = networks
    there = field(Recipe.load("smoke", [*SMALL, *overrides]), 2, host=address, port=8002, **facts)
    program = rehearse._PROGRAM
    for name, space in (
        ("server", here),
        *zip(there.federation.sites, (space for space, _ in others), strict=True),
    ):
        monkeypatch.setattr(rehearse, "_PROGRAM", ["ip", "netns", "exec", space, *program])
        there.start(name)
    monkeypatch.setattr(sys.modules[__name__], "FEDMERGE", ["ip", "netns", "exec", here, *FEDMERGE])
    there.run("--wait", 60, "--least", 2)
    assert there.operator.wait(300) == 0, "".join(there.lines)
    there.reader.join(10)
    return there


def test_server_and_sites_on_networks_of_their_own(networks, field, monkeypatch):
    """Nothing depends on localhost: each end has its own address, and its own loopback."""
    run = Run.open(ended_on(networks, field, monkeypatch, "rounds=2").out / "server" / "run")
    assert run.ended
    assert [len(record["clients"]) for record in run.records] == [6, 6]


def test_what_takes_a_slow_line_long_is_waited_for_and_sent_once(slow_line, field, monkeypatch):
    two = [
        "data.filter={organisation: [Fen Water, Harbour Clinic]}",
        "strategy=fedavg",
        "evaluation.finetuned=false",
        "lora.r=500",
    ]
    there = ended_on(slow_line, field, monkeypatch, *two, "rounds=1", deadline=120)
    run = Run.open(there.out / "server" / "run")
    assert [len(record["clients"]) for record in run.records] == [2]
    assert "adapters sent to 2 of 2 clients" in "".join(there.lines)
    told = subprocess.run(
        ["ip", "-s", "-j", "-n", slow_line[0][0], "link", "show", "eth0"],
        capture_output=True,
        check=True,
    ).stdout
    sent = json.loads(told)[0]["stats64"]["tx"]["bytes"]
    adapter = 4 * run.soup.layout.size
    assert (
        adapter > 5 * 125_000 / 2
    )  # at 1 Mbit/s two of them take longer than the 5 s after which FLARE, left alone, sends again
    assert 6 * adapter < sent < 8 * adapter  # to train, to score, to keep; and what else is said

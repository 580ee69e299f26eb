"""Federations whose server and sites are on separate networks."""

import json
import os
import subprocess
import sys

import pytest

from fedmerge_peft import Recipe, Run
from sites.processes import FEDMERGE, SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and sockets"),
    pytest.mark.usefixtures("one_thread"),
]


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
            pair = [f"{tag}-v{last}", "type", "veth", "peer", "name", "eth0", "netns", space]
            ip("link", "add", *pair)
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
    monkeypatch.setattr("sites.processes.FEDMERGE", ["ip", "netns", "exec", here, *FEDMERGE])
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

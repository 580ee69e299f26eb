"""FLARE processes over TLS: a site executes nothing for other sites, and no commands of the server.

Each attack is also made on a site without this package's gate, where it succeeds.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmerge_peft import Recipe
from fedmerge_peft.sites.config import SOCKETS_VARIABLE
from fedmerge_peft.sites.rehearse import await_server, prepare_rehearsal
from fedmerge_peft.sites.supervisor import ChildProcess, child_environment
from sites.processes import SMALL, children_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="needs Unix sockets"),
    pytest.mark.usefixtures("one_thread"),
]
HOSTILE = Path(__file__).with_name("hostile.py")
PACKAGE = "fedmerge_peft.sites.flare.child"


class Machines:
    """Server and two sites as FLARE's main processes, without trainers."""

    def __init__(self, out):
        from fedmerge_peft.sites.flare.provision import write_server_policy
        from fedmerge_peft.sites.flare.site_kit import secure_site_kit

        self.out, self.running = out, {}
        self.federation = prepare_rehearsal(Recipe.load("smoke", SMALL), 2, out)
        write_server_policy(self.kit("server"))
        for name in self.federation.sites:
            secure_site_kit(self.kit(name))

    def kit(self, name):
        return self.out / name if name == "server" else self.out / "sites" / name

    def start(self, name, program, **environment):
        """Start a process: ``PACKAGE``, as users run it, or ``HOSTILE``."""
        kind = ["server"] if name == "server" else ["client"]
        site = [] if name == "server" else [name]
        folder = self.out / f"sockets-{name}"
        folder.mkdir(mode=0o700)
        command = [sys.executable, "-u", *(["-m"] if program == PACKAGE else []), str(program)]
        self.running[name] = ChildProcess(
            name,
            [*command, *kind, str(self.kit(name)), *site],
            self.out / f"{name}.log",
            {**child_environment(), SOCKETS_VARIABLE: str(folder), **environment},
        )
        if name == "server":
            await_server(self.federation, self.running[name])

    def attack(self, attacker, victim_program):
        """Attack site-1 from the server or from site-2; return the answers."""
        results = self.out / "results.json"
        environment = {
            "ATTACK_TARGET": "site-1",
            "ATTACK_FILE": str(self.kit("site-1") / "startup" / "client.key"),
            "ATTACK_RESULTS": str(results),
        }
        if attacker == "server":
            self.start("server", HOSTILE, **environment)
            self.start("site-1", victim_program)
        else:
            # a server with the gate passes nothing on; one without it is as bad as a hostile one
            self.start("server", PACKAGE if victim_program == PACKAGE else HOSTILE)
            self.start("site-1", victim_program)
            time.sleep(8)
            self.start("site-2", HOSTILE, **environment)
        end = time.monotonic() + 150
        while not results.exists():
            assert time.monotonic() < end, (self.out / f"{attacker}.log").read_text()[-3000:]
            time.sleep(0.2)
        return json.loads(results.read_text())

    def stop(self):
        for process in self.running.values():
            process.stop()


@pytest.fixture
def machines(tmp_path):
    started = Machines(tmp_path / "federation")
    yield started
    started.stop()


@pytest.mark.parametrize("attacker", ["server", "site-2"])
def test_a_site_without_the_gate_gives_its_private_key_away(machines, attacker):
    answers = machines.attack(attacker, HOSTILE)
    assert any("PRIVATE KEY" in answer for answer in answers.values()), answers


@pytest.mark.parametrize("attacker", ["server", "site-2"])
def test_a_site_gives_neither_files_nor_its_environment_away(machines, attacker):
    answers = machines.attack(attacker, PACKAGE)
    assert not any("PRIVATE KEY" in answer for answer in answers.values()), answers
    reported = [text for name, text in answers.items() if not name.startswith("shutdown")]
    assert not any("workspace" in text or "successfully" in text for text in reported), answers
    assert (machines.kit("site-1") / "local").is_dir()
    assert not (machines.kit("site-1") / "shutdown.fl").exists()
    assert machines.running["site-1"].process.poll() is None
    if attacker == "server":  # the requests have arrived, and were refused
        assert any("invalid_request" in text for text in reported), answers


def test_no_process_of_a_site_listens_on_a_port(machines):
    machines.start("server", PACKAGE)
    machines.start("site-1", PACKAGE)
    folder = machines.out / "sockets-site-1"
    end = time.monotonic() + 60
    while not any(folder.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.2)
    site = machines.running["site-1"].process.pid
    assert not listening_ports([site, *children_of(site)])
    server = machines.running["server"].process.pid
    assert listening_ports([server]) == {machines.federation.port}
    (address,) = folder.iterdir()
    assert address.stat().st_mode & 0o077 == 0
    if os.getuid() == 0:
        program = "import os, socket, sys; os.setuid(65534)\n"
        program += "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        other = subprocess.run(
            [sys.executable, "-c", program, str(address)], capture_output=True, text=True
        )
        assert "PermissionError" in other.stderr


def listening_ports(processes):
    """Return the TCP ports on which processes listen."""
    inodes = set()
    for process in processes:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            target = str(entry.readlink())
            if target.startswith("socket:"):
                inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports

"""Processes of a prepared federation, which tests start, kill and restart."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SMALL = [
    "data.max_train=4",
    "data.max_test=3",
    "data.filter.provider=[Alder, Birch]",
    "training.device=cpu",
    "baselines=[]",
]
FEDMERGE = [sys.executable, "-c", "from fedmerge_peft.cli import main; main()"]


def fedmerge(*arguments, check=True):
    return subprocess.run(
        [*FEDMERGE, *map(str, arguments)], capture_output=True, text=True, check=check, timeout=600
    )


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

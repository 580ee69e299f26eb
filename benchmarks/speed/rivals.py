"""Programs in processes of their own that run a round whenever it is their turn.

A program connects to the socket of the process that measures, and calls ``Turns.boundary`` before
its first round and after each. There it waits, so that rounds of several programs alternate. All
of them, and the processes that they start, share one core.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from timing import Row, faster, race

HERE = Path(__file__).resolve().parent


class Turns:
    """The side of a program."""

    def __init__(self, address: str) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        self._lines = connection.makefile("rw")

    def boundary(self) -> None:
        """Report that a round ended, and wait for the next turn."""
        self._lines.write("ready\n")
        self._lines.flush()
        if not self._lines.readline():
            raise SystemExit("the measuring process has ended")


class Program:
    """The side of the measuring process.

    ``startup`` is the time from the start of the program to the end of its first round, which is
    not counted among the others.
    """

    def __init__(self, folder: Path, rounds: int, script: str, *arguments: str) -> None:
        """Start ``script FOLDER ROUNDS ADDRESS ARGUMENTS`` and run its first round."""
        self._scratch = scratch = Path(mkdtemp(prefix="speed-"))
        address = str(scratch / "turns")
        self._log = scratch / "log"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(0.5)
        command = [sys.executable, str(HERE / script), str(folder), str(rounds), address]
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        begin = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *arguments],
                cwd=scratch,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with listener:
            self._lines = self._accept(listener)
        self._wait()
        self.round()
        self.startup = time.perf_counter() - begin

    def round(self) -> None:
        """Run one round."""
        self._lines.write("go\n")
        self._lines.flush()
        self._wait()

    def processor_time(self) -> float:
        """Return the processor time of the program and the processes that it started, so far."""
        processes: dict[int, tuple[int, int]] = {}  # parent, and ticks with those of ended children
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            processes[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15]))
        own = {self._process.pid}
        while more := {each for each in processes if processes[each][0] in own} - own:
            own |= more
        return sum(processes[each][1] for each in own) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Let the program end, which is expected to have run all its rounds."""
        try:
            self._lines.write("go\n")
            self._lines.flush()
            self._process.wait(120)
        except (OSError, subprocess.TimeoutExpired):
            pass
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._lines.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _accept(self, listener: socket.socket):  # type: ignore[no-untyped-def]
        while self._process.poll() is None:
            try:
                with listener.accept()[0] as connection:
                    return connection.makefile("rw")
            except TimeoutError:
                continue
        raise self._failure()

    def _wait(self) -> None:
        if self._lines.readline() != "ready\n":
            raise self._failure()

    def _failure(self) -> RuntimeError:
        last = self._log.read_text(errors="replace")[-3000:]
        return RuntimeError(f"a program ended early; the end of {self._log}:\n{last}")


@contextmanager
def one_core() -> Iterator[None]:
    """Confine this process, and those that it starts, to one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compared(
    folder: Path,
    what: str,
    rivals: Mapping[str, tuple[str, ...]],
    wanted: Mapping[str, str],
    repeats: int,
) -> Iterator[Row]:
    """Yield the rows of rounds, and of start-up with the first round, against each rival.

    Processor time is that of all processes of a program; waits are not part of it.

    Args:
        folder: Workload from ``workload.write``.
        what: Description of the workload.
        rivals: Script and arguments of each program.
        wanted: Targets of the rounds.
        repeats: Rounds of each program after its first.
    """
    scripts = {"ours": ("ours.py",), **rivals}
    programs: dict[str, Program] = {}
    used: dict[str, list[float]] = {name: [] for name in scripts}

    def turn(name: str) -> None:
        before = programs[name].processor_time()
        programs[name].round()
        used[name].append(programs[name].processor_time() - before)

    with one_core():
        try:
            for name, script in scripts.items():
                programs[name] = Program(folder, repeats + 1, *script)
            taken = race({name: partial(turn, name) for name in scripts}, repeats, warm=False)
        finally:
            for program in programs.values():
                program.end()
    for name in rivals:
        for measure, times, target in (
            ("", taken, wanted.get(name, "")),
            (", processor time", used, ""),
            (", start to end of round 1", {each: [programs[each].startup] for each in scripts}, ""),
        ):
            row = faster(f"{name}; {what}{measure}", times, "ours", name, target)
            yield replace(row, sides=row.sides.replace(name, "theirs"))

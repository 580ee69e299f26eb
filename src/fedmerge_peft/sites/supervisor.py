"""The long-lived commands: ``fedmerge federate server`` and ``site``. They start processes, start them again, and end them.

Nothing here imports torch or nvflare, so that these commands themselves stay small.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import ADDRESS, KIT, REFUSED, SETTINGS, SiteSettings

SHUTDOWN = "shutdown.fl"
"""FLARE leaves this file in a kit that the operator has shut down."""
_MB = 2**20
_FLARE = {
    "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "15",  # seconds until a site that has gone is given up
    "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "60",  # seconds that a job which has ended at the server waits for it to end at sites
    "NVFLARE_STREAMING_WINDOW_SIZE": str(
        8 * _MB
    ),  # on its way and not acknowledged; more queues up before a slow line, unseen
    "NVFLARE_STREAMING_ACK_INTERVAL": str(2 * _MB),
    "NVFLARE_STREAMING_RETRY_WAIT": "60",  # seconds until a piece is sent again; its own 5 fill a slow line with copies
    "NVFLARE_STREAMING_RETRY_TIMEOUT": "600",
    "NVFLARE_GET_TASK_TIMEOUT": "30",  # from here on seconds without progress, or an answer, until a site asks the server again
    "NVFLARE_SUBMIT_TASK_RESULT_TIMEOUT": "60",
    "NVFLARE_TASK_CHECK_TIMEOUT": "30",
    "NVFLARE_RUNNER_SYNC_TIMEOUT": "10",
    "NVFLARE_MAX_RUNNER_SYNC_TIMEOUT": "600",  # seconds in all that a site tries to get into a job
}
"""Settings of FLARE's, as environment variables. With its own, what takes a slow line longer than 5 s is asked for, and sent, again."""
_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4096 * _MB),
    "MALLOC_TRIM_THRESHOLD_": str(8192 * _MB),
}
"""Settings of glibc's: a message's memory is kept for the next one, as it takes longer to have it anew from the system than to send it."""
_POLL = 0.2
"""Seconds between two looks at children."""
_PATIENCE = 10.0
"""Seconds that a child has to end by itself."""
_PAUSE = 2.0
"""Seconds before a child that died is started again."""
_FAILURES = 5
"""So many deaths within a minute, and starting again is given up."""


class Stopped(Exception):  # noqa: N818 (somebody's wish)
    """SIGINT or SIGTERM; ``code`` is the exit code."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


class Child:
    """A process of ours, with its output in a file."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path | None, environment: Mapping[str, str]
    ) -> None:
        self.name, self.command, self.log, self.environment = name, command, log, environment
        self.died: list[float] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        if self.log is None:
            return subprocess.Popen(  # noqa: S603
                self.command, env=dict(self.environment), stdin=subprocess.DEVNULL
            )
        with self.log.open("ab") as file:
            return subprocess.Popen(  # noqa: S603
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def again(self) -> None:
        """Start it once more. Raises ``FederateError`` where it keeps dying."""
        now = time.monotonic()
        self.died = [then for then in self.died if now - then < 60] + [now]
        where = f"; {self.log} has more" if self.log is not None else ""
        if len(self.died) >= _FAILURES:
            raise FederateError(f"the {self.name} died {_FAILURES} times within a minute{where}")
        print(
            f"the {self.name} ended with code {self.process.returncode}; it is started again",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_PAUSE)
        self.process = self._start()

    def end(self) -> None:
        """End it, by force where it does not want to."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def serve_server(kit: Path) -> None:
    """Run the server's side of FLARE until it is stopped. Raises ``FederateError``, ``Stopped``."""
    (kit / SHUTDOWN).unlink(missing_ok=True)
    command = [
        sys.executable,
        "-u",
        "-m",
        "fedmerge_peft.sites.flare.child",
        "server",
        str(kit.resolve()),
    ]
    with _children() as children:
        children.append(Child("server", command, kit / "server.log", environment()))
        _watch(kit, children)


def serve_site(kit: Path, site: str, settings: SiteSettings) -> None:
    """Run a site, its trainer and its side of FLARE, until it is stopped. Raises ``FederateError``, ``Stopped``."""
    (kit / SHUTDOWN).unlink(missing_ok=True)
    kit = kit.resolve()
    folder = Path(
        tempfile.mkdtemp(prefix="fedmerge-")
    )  # a socket's path may have a hundred characters
    own = {**environment(), KIT: str(kit), SETTINGS: settings.model_dump_json()}
    try:
        with _children() as children:
            if settings.process == "attached":
                own[ADDRESS] = str(folder / "trainer")
                trainer = [
                    sys.executable,
                    "-u",
                    "-m",
                    "fedmerge_peft.sites.site.trainer_process",
                    site,
                ]
                children.append(Child("trainer", trainer, None, own))
            client = [
                sys.executable,
                "-u",
                "-m",
                "fedmerge_peft.sites.flare.child",
                "client",
                str(kit),
                site,
            ]
            children.append(Child("connection", client, kit / "site.log", own))
            _watch(kit, children)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict[str, str]:
    """For children: what FLARE and the C library are told, and this process' own variables, which win."""
    return {**_FLARE, **_MEMORY, **os.environ}


def _watch(kit: Path, children: Sequence[Child]) -> None:
    """Start again what dies, until the operator shuts the federation down."""
    while True:
        for child in children:
            if child.process.poll() is None:
                continue
            if (kit / SHUTDOWN).exists():
                return
            if child.process.returncode == REFUSED:
                raise FederateError(
                    f"the {child.name} has said what is wrong"
                    + (f" in {child.log}" if child.log else ", above")
                )
            child.again()
        time.sleep(_POLL)


@contextmanager
def _children() -> Iterator[list[Child]]:
    """Children that end with the block, whatever ends it; SIGINT and SIGTERM do by ``Stopped``."""

    def hear(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    children: list[Child] = []
    try:
        yield children
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(children):
            child.end()
        for number, handler in before.items():
            signal.signal(number, handler)

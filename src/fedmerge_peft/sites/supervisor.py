"""Long-lived processes of ``fedmerge federate server`` and ``site``: start, restart and stop.

This module imports neither torch nor nvflare, so that the parent process stays small.
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
from fedmerge_peft.sites.config import (
    ADDRESS_VARIABLE,
    KIT_VARIABLE,
    PERMANENT_FAILURE,
    SETTINGS_VARIABLE,
    SOCKETS_VARIABLE,
    SiteSettings,
)

SHUTDOWN_FILE = "shutdown.fl"
"""File that FLARE creates in a kit when the operator shuts the federation down."""
_MB = 2**20
_FLARE = {
    # seconds until a site that has disconnected is considered dead
    "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "15",
    # seconds that a finished job at the server waits for the job to end at the sites
    "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "60",
    # largest number of unacknowledged bytes; a larger window delays messages on a slow line
    "NVFLARE_STREAMING_WINDOW_SIZE": str(8 * _MB),
    "NVFLARE_STREAMING_ACK_INTERVAL": str(2 * _MB),
    # seconds until a chunk is sent again; the default of 5 fills a slow line with copies
    "NVFLARE_STREAMING_RETRY_WAIT": "60",
    "NVFLARE_STREAMING_RETRY_TIMEOUT": "600",
    # seconds without progress or reply until a site repeats a request to the server
    "NVFLARE_GET_TASK_TIMEOUT": "30",
    "NVFLARE_SUBMIT_TASK_RESULT_TIMEOUT": "60",
    "NVFLARE_TASK_CHECK_TIMEOUT": "30",
    "NVFLARE_RUNNER_SYNC_TIMEOUT": "10",
    # total seconds during which a site tries to join a job
    "NVFLARE_MAX_RUNNER_SYNC_TIMEOUT": "600",
}
"""FLARE settings, as environment variables. With FLARE's defaults, a transfer that takes longer
than 5 s on a slow line is requested and sent again."""
_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4096 * _MB),
    "MALLOC_TRIM_THRESHOLD_": str(8192 * _MB),
}
"""glibc settings that keep a message's memory for the next message: allocating it again takes
longer than sending the message."""
_POLL_INTERVAL = 0.2
"""Seconds between two checks of the child processes."""
_STOP_TIMEOUT = 10.0
"""Seconds that a child process has to exit after SIGTERM."""
_RESTART_DELAY = 2.0
"""Seconds before a child process that died is restarted."""
_MAX_FAILURES = 5
"""Number of deaths within a minute after which a child process is not restarted."""


class StoppedBySignal(Exception):  # noqa: N818 (a normal end, not an error)
    """Raised on SIGINT and SIGTERM; ``code`` is the exit code."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


class ChildProcess:
    """A child process that writes its output to a file, or to the output of this process."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path | None, environment: Mapping[str, str]
    ) -> None:
        self.name, self.command, self.log, self.environment = name, command, log, environment
        self.deaths: list[float] = []
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

    def restart(self) -> None:
        """Start the process again. Raises ``FederateError`` if it dies too often."""
        now = time.monotonic()
        self.deaths = [death for death in self.deaths if now - death < 60] + [now]
        if len(self.deaths) >= _MAX_FAILURES:
            place = self.log or "the output above"
            raise FederateError(
                f"the {self.name} process exited {_MAX_FAILURES} times within a minute; see {place}"
            )
        print(
            f"the {self.name} process exited with code {self.process.returncode}; restarting it",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_RESTART_DELAY)
        self.process = self._start()

    def stop(self) -> None:
        """Terminate the process; kill it if it does not exit in time."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def run_server(kit: Path) -> None:
    """Run the server's FLARE process until the operator shuts the federation down.

    Raises:
        FederateError: The process cannot run, or dies too often.
        StoppedBySignal: SIGINT or SIGTERM arrived.
    """
    (kit / SHUTDOWN_FILE).unlink(missing_ok=True)
    command = [
        sys.executable,
        "-u",
        "-m",
        "fedmerge_peft.sites.flare.child",
        "server",
        str(kit.resolve()),
    ]
    with _socket_folder() as folder, _child_processes() as children:
        environment = {**child_environment(), SOCKETS_VARIABLE: str(folder)}
        children.append(ChildProcess("server", command, kit / "server.log", environment))
        _supervise(kit, children)


def run_site(kit: Path, site: str, settings: SiteSettings) -> None:
    """Run a site's trainer and FLARE processes until the operator shuts the federation down.

    Raises:
        FederateError: A process cannot run, or dies too often.
        StoppedBySignal: SIGINT or SIGTERM arrived.
    """
    (kit / SHUTDOWN_FILE).unlink(missing_ok=True)
    kit = kit.resolve()
    with _socket_folder() as folder, _child_processes() as children:
        environment = {
            **child_environment(),
            KIT_VARIABLE: str(kit),
            SETTINGS_VARIABLE: settings.model_dump_json(),
            SOCKETS_VARIABLE: str(folder),
        }
        if settings.process == "attached":
            environment[ADDRESS_VARIABLE] = str(folder / "trainer")
            trainer = [
                sys.executable,
                "-u",
                "-m",
                "fedmerge_peft.sites.site.trainer_process",
                site,
            ]
            children.append(ChildProcess("trainer", trainer, None, environment))
        client = [
            sys.executable,
            "-u",
            "-m",
            "fedmerge_peft.sites.flare.child",
            "client",
            str(kit),
            site,
        ]
        children.append(ChildProcess("connection", client, kit / "site.log", environment))
        _supervise(kit, children)


@contextmanager
def _socket_folder() -> Iterator[Path]:
    """Yield a new folder for sockets that only this user may open; remove it after the block.

    It is in the system's temporary folder, whose path is usually short: the path of a socket is
    limited to about a hundred characters.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedmerge-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def child_environment() -> dict[str, str]:
    """Return the environment of child processes.

    The environment contains the settings of FLARE and glibc above, unless variables of this
    process override them. With ``PYTHONSAFEPATH``, Python does not import modules from the current
    folder: FLARE starts jobs in the kit, which somebody else has written.
    """
    return {**_FLARE, **_MEMORY, **os.environ, "PYTHONSAFEPATH": "1"}


def _supervise(kit: Path, children: Sequence[ChildProcess]) -> None:
    """Restart child processes that die, until the operator shuts the federation down.

    Raises:
        FederateError: A process dies too often, or with an error that a restart cannot fix.
    """
    while True:
        for child in children:
            if child.process.poll() is None:
                continue
            if (kit / SHUTDOWN_FILE).exists():
                return
            if child.process.returncode == PERMANENT_FAILURE:
                place = child.log or "the message above"
                raise FederateError(f"the {child.name} process failed; see {place}")
            child.restart()
        time.sleep(_POLL_INTERVAL)


@contextmanager
def _child_processes() -> Iterator[list[ChildProcess]]:
    """Yield an empty list; processes added to it are stopped when the block ends or raises.

    SIGINT and SIGTERM end the block with ``StoppedBySignal``.
    """

    def on_signal(number: int, _: FrameType | None) -> None:
        raise StoppedBySignal(number)

    handlers = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    children: list[ChildProcess] = []
    try:
        yield children
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(children):
            child.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)

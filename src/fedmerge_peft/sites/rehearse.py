"""A federation on one machine: server and sites as separate processes, over loopback and TLS."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmerge_peft.data import federate_data
from fedmerge_peft.errors import FederateError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.sites.config import FederationFile
from fedmerge_peft.sites.prepare import federated_recipe, prepare
from fedmerge_peft.sites.site_data import split_clients, write_site_data
from fedmerge_peft.sites.supervisor import ChildProcess, child_environment

_PROGRAM = [sys.executable, "-c", "from fedmerge_peft.cli import main; main()", "federate"]
_START_TIMEOUT = 180.0
"""Maximum time until the server listens, in seconds."""


def prepare_rehearsal(recipe: Recipe, sites: int, out: Path, **options: Any) -> FederationFile:
    """Prepare a federation on a free local port, and split the recipe's data over its sites.

    Args:
        recipe: The recipe whose clients are split over the sites, in order.
        sites: Number of sites.
        out: A new folder.
        options: Fields of ``FederationFile``, such as ``wire_dtype``.

    Raises:
        DataError: There are fewer clients than sites, or the data cannot be read.
        RecipeError: Sites cannot run a strategy of the recipe.
        PluginError: A partition scheme from a plugin fails.
        FederateError, RunExistsError, RunError: See ``prepare``.
    """
    recipe = federated_recipe(recipe)
    data = federate_data(
        recipe.data, recipe.task.label_column, recipe.seed, recipe.task.media_column
    )
    settings = {"project": "rehearsal", "host": "localhost", "port": free_port(), **options}
    federation = FederationFile(sites=split_clients(data, sites), **settings)
    prepare(recipe, federation, out)
    own = {"remote_code": recipe.backbone.trust_remote_code, "plugins": recipe.plugins}
    for site, clients in federation.sites.items():
        write_site_data(data, clients, out / "sites" / site, {"allow": own})
    return federation


@contextmanager
def running_processes(out: Path, federation: FederationFile) -> Iterator[dict[str, ChildProcess]]:
    """Run server and sites as processes within a block; yield the processes by name.

    The name of the server is ``server``. All processes are stopped at the end of the block.

    Raises:
        FederateError: The server does not start.
    """
    processes: dict[str, ChildProcess] = {}
    try:
        processes["server"] = start_server(out)
        for site in federation.sites:
            processes[site] = start_site(out, site)
        await_server(federation, processes["server"])
        yield processes
    finally:
        for process in reversed(processes.values()):
            process.stop()


def start_server(out: Path) -> ChildProcess:
    """Start ``fedmerge federate server``, with its output in ``server.out``."""
    return ChildProcess(
        "server",
        [*_PROGRAM, "server", str(out / "server")],
        out / "server.out",
        child_environment(),
    )


def start_site(out: Path, site: str) -> ChildProcess:
    """Start ``fedmerge federate site``, with its output in ``<site>.out``.

    ``--trust-remote-code`` is set, because this user has written the kit and its recipe.
    """
    return ChildProcess(
        site,
        [*_PROGRAM, "site", str(out / "sites" / site), "--trust-remote-code"],
        out / f"{site}.out",
        child_environment(),
    )


def run_rehearsal(
    out: Path,
    federation: FederationFile,
    report: Callable[[str], None],
    *,
    wait: float = 120.0,
    min_sites: int | None = None,
) -> dict[str, Any]:
    """Run a prepared rehearsal to its end; return the last job's outcome.

    The outcome of a failed run has the state ``failed``.

    Args:
        out: The folder that ``prepare_rehearsal`` wrote.
        federation: The federation that ``prepare_rehearsal`` returned.
        report: Called with a line of text for each event.
        wait: Seconds to wait for all sites; after that, ``min_sites`` connected sites suffice.
        min_sites: Smallest number of connected sites with which a job starts. Default: all sites.

    Raises:
        FederateError: A process exited, the server does not start or respond, or refuses a request,
            or several consecutive jobs left no outcome.
    """
    from fedmerge_peft.sites.flare.operator import SiteWait, run

    with running_processes(out, federation) as processes:

        def check_processes() -> None:
            for name, child in processes.items():
                if child.process.poll() is not None:
                    who = "the server" if name == "server" else f"the site {name}"
                    raise FederateError(
                        f"{who} exited with code {child.process.returncode}: "
                        f"{last_line(out, name)}; see {child.log}"
                    )

        return run(
            out / "operator",
            report,
            wait=SiteWait(wait, min_sites or len(federation.sites)),
            reconnect_timeout=30.0,
            on_poll=check_processes,
        )


def await_server(federation: FederationFile, server: ChildProcess) -> None:
    """Wait until the server listens. Raises ``FederateError`` if it exits or takes too long."""
    start = time.monotonic()
    while time.monotonic() - start < _START_TIMEOUT:
        if server.process.poll() is not None:
            raise FederateError(
                f"the server exited with code {server.process.returncode}; see {server.log}"
            )
        try:
            with socket.create_connection((federation.host, federation.port), timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise FederateError(
        f"the server does not listen on {federation.host}:{federation.port} "
        f"after {_START_TIMEOUT:.0f} s; see {server.log}"
    )


def last_line(out: Path, name: str) -> str:
    """Return the last line of a process's output; ``no output`` if there is none."""
    lines = (out / f"{name}.out").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def free_port() -> int:
    """Return a TCP port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])

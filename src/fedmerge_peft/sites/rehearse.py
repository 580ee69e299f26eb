"""A whole federation on one machine: a server and sites as processes of their own, over loopback, with certificates as in earnest."""

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
from fedmerge_peft.sites.config import Federation
from fedmerge_peft.sites.prepare import as_federated, prepare
from fedmerge_peft.sites.site_data import deal, write_site
from fedmerge_peft.sites.supervisor import Child, environment

_PROGRAM = [sys.executable, "-c", "from fedmerge_peft.cli import main; main()", "federate"]
_START = 60.0
"""Seconds that the server may take to listen."""


def rehearsal(recipe: Recipe, sites: int, out: Path, **facts: Any) -> Federation:
    """Prepare a federation on a free port of this machine, and deal the recipe's own data to its sites.

    Args:
        recipe: Whose clients are spread over the sites, in their order.
        sites: How many.
        out: A new folder.
        facts: Fields of ``Federation``, such as ``wire_dtype``.

    Raises:
        DataError: There are fewer clients than sites, or no data.
        FederateError: As ``prepare``.
    """
    recipe = as_federated(recipe)
    data = federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed)
    settings = {"project": "rehearsal", "host": "localhost", "port": free_port(), **facts}
    federation = Federation(sites=deal(data, sites), **settings)
    prepare(recipe, federation, out)
    for site, clients in federation.sites.items():
        write_site(data, clients, out / "sites" / site, {})
    return federation


@contextmanager
def running(out: Path, federation: Federation) -> Iterator[dict[str, Child]]:
    """Server and sites as processes; they end with the block. By name, ``server`` among them."""
    children: dict[str, Child] = {}
    try:
        children["server"] = start_server(out)
        for site in federation.sites:
            children[site] = start_site(out, site)
        await_server(federation, children["server"])
        yield children
    finally:
        for child in reversed(children.values()):
            child.end()


def start_server(out: Path) -> Child:
    """``fedmerge federate server``, with what it says in ``server.out``."""
    return Child(
        "server", [*_PROGRAM, "server", str(out / "server")], out / "server.out", environment()
    )


def start_site(out: Path, site: str) -> Child:
    """``fedmerge federate site``, with what it says in ``<site>.out``."""
    return Child(
        site, [*_PROGRAM, "site", str(out / "sites" / site)], out / f"{site}.out", environment()
    )


def rehearse(
    out: Path,
    federation: Federation,
    tell: Callable[[str], None],
    *,
    wait: float = 120.0,
    least: int | None = None,
) -> dict[str, Any]:
    """Run a prepared rehearsal to its end; the last job's outcome. Raises ``FederateError``."""
    from fedmerge_peft.sites.flare.operator import run

    with running(out, federation) as children:

        def watch() -> None:
            for name, child in children.items():
                if child.process.poll() is not None:
                    raise FederateError(
                        f"{name} ended with code {child.process.returncode}: {last_words(out, name)}"
                    )

        return run(
            out / "operator",
            tell,
            wait=wait,
            least=least or len(federation.sites),
            patience=30.0,
            watch=watch,
        )


def await_server(federation: Federation, server: Child) -> None:
    """Wait until the server listens. Raises ``FederateError``."""
    begin = time.monotonic()
    while time.monotonic() - begin < _START:
        if server.process.poll() is not None:
            raise FederateError(
                f"the server ended with code {server.process.returncode}; {server.log} has more"
            )
        try:
            with socket.create_connection((federation.host, federation.port), timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise FederateError(
        f"the server does not listen on {federation.host}:{federation.port} after {_START:.0f} s; {server.log} has more"
    )


def last_words(out: Path, name: str) -> str:
    """The last line that a process said."""
    lines = (out / f"{name}.out").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])

"""Arguments of ``fedmerge federate``: the server's address, the sites with their clients, and the
project's name.
"""

from __future__ import annotations


def parse_address(text: str) -> tuple[str, int]:
    """Parse ``HOST:PORT``. Raises ``FederateError`` for other text."""
    from fedmerge_peft.errors import FederateError

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise FederateError(f"--server: {text!r}, expected HOST:PORT, such as fl.example.org:8002")
    return host, int(port)


def parse_sites(sites: str, clients: list[str]) -> dict[str, list[str]]:
    """Return the clients of each site. A site that ``clients`` omits has one client of its name.

    Args:
        sites: Names of the sites, separated by commas.
        clients: Items of the form ``SITE=NAME``.

    Raises:
        FederateError: Names of sites are missing or repeated; an item of ``clients`` is malformed
            or names an unknown site.
    """
    from fedmerge_peft.errors import FederateError

    names = [name.strip() for name in sites.split(",") if name.strip()]
    if not names:
        raise FederateError(
            "--sites: no site is named; give names, separated by commas, such as north,south,east"
        )
    if len(names) != len(set(names)):
        raise FederateError(f"--sites: {sites!r}, expected unique names, such as north,south,east")
    by_site: dict[str, list[str]] = {name: [] for name in names}
    for text in clients:
        name, equals, client = text.partition("=")
        if not equals or not client or name not in by_site:
            raise FederateError(
                f"--client: {text!r}, expected SITE=NAME with one of the sites {', '.join(names)}"
            )
        by_site[name].append(client)
    return {name: members or [name] for name, members in by_site.items()}


def project_name(name: str) -> str:
    """Turn a recipe's name into a project name: up to 40 characters that certificates allow."""
    allowed = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)
    return allowed.strip("-")[:40] or "federation"

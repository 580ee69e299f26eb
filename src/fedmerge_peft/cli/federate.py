"""``fedmerge federate``: the same recipe across sites, over TLS."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, app

if TYPE_CHECKING:
    from collections.abc import Callable

federate = typer.Typer(
    name="federate",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(federate)

WireDtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(help="Numbers of adapters on their way; bfloat16 halves the bytes."),
]
Segment = Annotated[
    int, typer.Option(min=1, help="Rounds in a job; who was away comes in with the next.")
]
Deadline = Annotated[
    int, typer.Option(min=1, help="Seconds that a site has for its part of a round.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say how it ended, and no more.")]


@federate.callback()
def across_sites() -> None:
    """Run a recipe across sites that keep their data, over TLS.

    Needs the extra federate: pip install 'fedmerge-peft[federate]'

    Example: fedmerge federate rehearse smoke --sites 3
    """


@federate.command()
def prepare(
    recipe: RecipeSource,
    overrides: Overrides = None,
    sites: Annotated[str, typer.Option(help="Names of the sites, such as north,south,east.")] = "",
    client: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE=NAME",
            help="A client of a site; again for each. Default: one a site, of its name.",
        ),
    ] = None,
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where sites and operator reach the server.")
    ] = "localhost:8002",
    out: Annotated[Path, typer.Option(help="A new folder for the kits.")] = Path("federation"),
    wire_dtype: WireDtype = "float32",
    segment: Segment = 10,
    deadline: Deadline = 3600,
) -> None:
    """Make certificates, and a kit for the server, the operator and each site.

    Example: fedmerge federate prepare my.yaml --sites north,south --server fl.example.org:8002 --out federation
    """
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.config import Federation
    from fedmerge_peft.sites.prepare import prepare
    from fedmerge_peft.util.text import printable

    loaded = Recipe.load(recipe, overrides or [])
    host, port = _address(server)
    federation = Federation(
        project=_project(loaded.name),
        host=host,
        port=port,
        sites=_clients(sites, client or []),
        wire_dtype=wire_dtype,
        segment=segment,
        deadline=deadline,
    )
    prepare(loaded, federation, out)
    where = shlex.quote(str(out))
    print(
        printable(
            f"wrote {out}: server, operator, sites; authority holds the key that signs certificates: keep it off the network"
        )
    )
    print(
        f"\nnext:\n  fedmerge federate server {where}   # on {printable(host)}, which the sites reach at port {port}"
    )
    print(
        printable(
            f"  {where}/sites/NAME   # to each site, by a safe way; its README.md says what to run"
        )
    )
    print(f"  fedmerge federate run {where}   # wherever the operator is")


@federate.command()
def server(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The server's kit, or the folder that prepare made."),
    ],
) -> None:
    """Serve a federation until it is stopped; the run directory is DIR/run.

    Killed and started again, it goes on from the last whole round.

    Example: fedmerge federate server federation
    """
    from fedmerge_peft.sites.config import Federation
    from fedmerge_peft.sites.prepare import check_installed, check_kit
    from fedmerge_peft.sites.supervisor import serve_server
    from fedmerge_peft.util.text import printable

    check_installed()
    kit = check_kit(directory, "server")
    federation = Federation.read(kit)

    from fedmerge_peft.sites.flare.provision import settle

    settle(kit, server=True)
    print(
        printable(
            f"serving {federation.project} on port {federation.port}, for {', '.join(federation.sites)}; log: {kit}/server.log"
        ),
        flush=True,
    )
    _until_stopped(lambda: serve_server(kit))


@federate.command()
def site(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The site's kit.")],
    data: Annotated[
        Path | None, typer.Option(help="The examples: csv, tsv, json, jsonl, parquet, or a folder.")
    ] = None,
) -> None:
    """Take part as a site until it is stopped. What else the site decides is in DIR/site.yaml.

    Example: fedmerge federate site north --data tickets.csv
    """
    from fedmerge_peft.errors import FederateError
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.config import RECIPE, SITE, SiteSettings, refusal
    from fedmerge_peft.sites.prepare import check_installed, check_kit
    from fedmerge_peft.sites.supervisor import serve_site
    from fedmerge_peft.util.text import printable

    check_installed()
    kit = check_kit(directory, "")
    settings = SiteSettings.read(kit / SITE).with_data(
        data.absolute() if data is not None else None
    )
    if settings.data is None:
        raise FederateError(
            f"which data? fedmerge federate site {shlex.quote(str(directory))} --data FILE, or data: {{path: FILE}} in {kit / SITE}"
        )
    recipe = Recipe.load(kit / RECIPE)
    settings.applied(recipe)
    if why := refusal(recipe, recipe, settings.allow):
        raise FederateError(f"the recipe in the kit asks for more than {kit / SITE} allows: {why}")

    from fedmerge_peft.sites.flare.provision import settle, site_name

    name = site_name(kit)
    settle(kit, server=False)
    print(
        printable(f"site {name}; what leaves: {kit}/audit.jsonl; log: {kit}/site.log"), flush=True
    )
    _until_stopped(lambda: serve_site(kit, name, settings))


@federate.command()
def run(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The operator's kit, or the folder that prepare made."),
    ],
    wait: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds to wait for all sites before it begins with those that are there."
        ),
    ] = 600,
    least: Annotated[int, typer.Option(min=1, help="Sites that must be there to begin.")] = 1,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds that a lost server may take to come back.")
    ] = 300,
    quiet: Quiet = False,
) -> None:
    """Run the federation to its end. The same command goes on after an interruption.

    Example: fedmerge federate run federation --wait 60
    """
    from fedmerge_peft.sites.prepare import check_installed, check_kit

    check_installed()
    kit = check_kit(directory, "operator")

    from fedmerge_peft.sites.flare.operator import run

    outcome = _patiently(
        lambda: run(kit, _teller(quiet), wait=wait, least=least, patience=patience)
    )
    _conclude(
        outcome,
        "the server's kit, below run",
        f"fedmerge federate run {shlex.quote(str(directory))}",
    )


@federate.command()
def status(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The operator's kit, or the folder that prepare made."),
    ],
) -> None:
    """Show who is connected, and how far the federation is.

    Example: fedmerge federate status federation
    """
    from fedmerge_peft.sites.config import Federation
    from fedmerge_peft.sites.prepare import check_installed, check_kit
    from fedmerge_peft.util.text import printable

    check_installed()
    kit = check_kit(directory, "operator")

    from fedmerge_peft.sites.flare.operator import look

    found, known = look(kit), Federation.read(kit).sites
    taking = found.get("sites", []) if found["job"] else []
    for name in known:
        where = "connected" if name in found["connected"] else "away"
        print(f"{name:<24}{where}{', in the running job' if name in taking else ''}")
    print(f"job: {found['job'] or 'none runs'}")
    for line in found.get("told", [])[-5:]:
        print(printable(line))


@federate.command()
def stop(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The operator's kit, or the folder that prepare made."),
    ],
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for the round's end; the round is lost.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Shut the server and all sites down too.")
    ] = False,
) -> None:
    """Stop the federation after the round that runs; fedmerge federate run goes on from there.

    Example: fedmerge federate stop federation
    """
    from fedmerge_peft.sites.prepare import check_installed, check_kit

    check_installed()
    kit = check_kit(directory, "operator")

    from fedmerge_peft.sites.flare.operator import stop

    print(stop(kit, now=now, everything=everything))


@federate.command()
def rehearse(
    recipe: RecipeSource,
    overrides: Overrides = None,
    sites: Annotated[
        int, typer.Option(min=1, help="How many sites share the recipe's clients.")
    ] = 3,
    out: Annotated[
        Path | None, typer.Option(help="A new folder. Default: rehearsals/NAME.")
    ] = None,
    wire_dtype: WireDtype = "float32",
    segment: Segment = 10,
    deadline: Deadline = 3600,
    quiet: Quiet = False,
) -> None:
    """Run a federation on this machine: server and sites as processes, over loopback, with TLS on both sides.

    Example: fedmerge federate rehearse smoke --sites 3
    """
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.prepare import check_installed
    from fedmerge_peft.util.text import printable

    check_installed()
    loaded = Recipe.load(recipe, overrides or [])
    folder = out if out is not None else Path("rehearsals") / _project(loaded.name)

    from fedmerge_peft.sites.rehearse import rehearsal, rehearse

    federation = rehearsal(
        loaded, sites, folder, wire_dtype=wire_dtype, segment=segment, deadline=deadline
    )
    tell = _teller(quiet)
    tell(
        f"prepared {printable(str(folder))}; starting a server and {sites} site{'s' * (sites > 1)}"
    )
    outcome = _patiently(lambda: rehearse(folder, federation, tell))
    _conclude(
        outcome,
        str(folder / "server" / "run"),
        f"fedmerge federate server {shlex.quote(str(folder))}, its sites, and run",
    )


def _teller(quiet: bool) -> Callable[[str], None]:
    from fedmerge_peft.util.text import printable

    def tell(text: str) -> None:
        if not quiet:
            print("\n".join(map(printable, text.split("\n"))), flush=True)

    return tell


def _conclude(outcome: dict[str, Any], run: str, again: str) -> None:
    """Say how it ended; a failure is an error."""
    from fedmerge_peft.errors import FederateError
    from fedmerge_peft.util.text import printable

    done = f"{outcome['rounds']} of {outcome['total']} rounds are done"
    if outcome["state"] == "failed":
        raise FederateError(f"{outcome['error']}\n{done}; to go on from there: {again}")
    print(printable(f"{outcome['state']}: {done}. Run directory: {run}"))
    if outcome["state"] == "stopped":
        print(printable(f"to go on: {again}"))


def _until_stopped(serve: Callable[[], None]) -> None:
    from fedmerge_peft.sites.supervisor import Stopped

    try:
        serve()
    except Stopped as stopped:
        raise typer.Exit(stopped.code) from None


def _patiently(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do it with our own words alone: the libraries below log to the terminal otherwise."""
    import logging

    logging.getLogger("nvflare").setLevel(logging.CRITICAL)
    return work()


def _address(text: str) -> tuple[str, int]:
    from fedmerge_peft.errors import FederateError

    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise FederateError(f"--server: {text!r}, expected HOST:PORT, such as fl.example.org:8002")
    return host, int(port)


def _clients(sites: str, clients: list[str]) -> dict[str, list[str]]:
    """The clients of each site: one of its own name, unless some are given."""
    from fedmerge_peft.errors import FederateError

    names = [name.strip() for name in sites.split(",") if name.strip()]
    if not names or len(names) != len(set(names)):
        raise FederateError(
            f"--sites: {sites!r}, expected different names, such as north,south,east"
        )
    held: dict[str, list[str]] = {name: [] for name in names}
    for text in clients:
        name, equals, client = text.partition("=")
        if not equals or not client or name not in held:
            raise FederateError(
                f"--client: {text!r}, expected SITE=NAME with one of the sites {', '.join(names)}"
            )
        held[name].append(client)
    return {name: found or [name] for name, found in held.items()}


def _project(name: str) -> str:
    """A recipe's name as that of a project, which certificates carry."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name).strip(
        "-"
    )
    return kept[:40] or "federation"

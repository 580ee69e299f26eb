"""Commands of ``fedmerge federate``: run a recipe over TLS across sites."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, TrustRemoteCode, app
from fedmerge_peft.cli.federate_arguments import parse_address, parse_sites, project_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedmerge_peft.sites.config import SiteLimits

federate = typer.Typer(
    name="federate",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(federate)

WireDtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(help="Number format of adapters in messages; bfloat16 halves the bytes."),
]
Segment = Annotated[
    int, typer.Option(min=1, help="Rounds per job. A disconnected site can join the next job.")
]
Deadline = Annotated[
    int, typer.Option(min=1, help="Maximum time that a site may take for a round, in seconds.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the final result.")]


@federate.callback()
def across_sites() -> None:
    """Run a recipe over TLS across sites. Each site keeps its data.

    Requires the extra federate: pip install -e '.[federate]' in a checkout. Sites install it with
    the wheel in their kit.

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
            help="A client of a site; repeatable. Default: one client, with the site's name.",
        ),
    ] = None,
    server: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Address at which sites reach the server."),
    ] = "localhost:8002",
    out: Annotated[Path, typer.Option(help="A new folder for the kits.")] = Path("federation"),
    wire_dtype: WireDtype = "float32",
    segment: Segment = 10,
    deadline: Deadline = 3600,
) -> None:
    """Create certificates, and a kit for the server, the operator and each site.

    Example: fedmerge federate prepare my.yaml --sites north,south --server fl.example.org:8002
    """
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.config import FederationFile
    from fedmerge_peft.sites.prepare import prepare
    from fedmerge_peft.util.text import printable

    loaded = Recipe.load(recipe, overrides or [])
    host, port = parse_address(server)
    federation = FederationFile(
        project=project_name(loaded.name),
        host=host,
        port=port,
        sites=parse_sites(sites, client or []),
        wire_dtype=wire_dtype,
        segment=segment,
        deadline=deadline,
    )
    digest = prepare(loaded, federation, out, wheel=True)
    folder = shlex.quote(str(out))
    print(
        printable(
            f"wrote {out} with the folders server, operator, sites and authority; keep authority "
            "off the network, because it holds the key that signs certificates"
        )
    )
    if digest is None:
        print("no kit has a wheel: hatchling, or this package's record of its files, is missing;")
        print("run make dist in a checkout of this package, and give its wheel to the sites")
    else:
        print(f"each kit has the wheel of this package; tell the sites its SHA-256 sum: {digest}")
    print("\nnext:")
    print(f"  fedmerge federate server {folder}   # on {printable(host)}, reachable at port {port}")
    print(printable(f"  {folder}/sites/NAME   # copy to each site over a secure channel"))
    print(f"  fedmerge federate run {folder}   # on the operator's machine")


@federate.command()
def server(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The server's kit, or the folder written by prepare."),
    ],
) -> None:
    """Run the server of a federation until it is stopped.

    The run directory is the folder run in the server's kit. After a restart, the server continues
    from the last completed round.

    Example: fedmerge federate server federation
    """
    from fedmerge_peft.sites.config import FederationFile
    from fedmerge_peft.sites.prepare import check_installed, find_kit
    from fedmerge_peft.sites.supervisor import run_server
    from fedmerge_peft.util.text import printable

    check_installed()
    kit = find_kit(directory, "server")
    federation = FederationFile.read(kit)

    from fedmerge_peft.sites.flare.provision import write_server_policy

    write_server_policy(kit)
    print(
        printable(
            f"serving {federation.project} on port {federation.port}, for "
            f"{', '.join(federation.sites)}; log: {kit}/server.log"
        ),
        flush=True,
    )
    _run_until_stopped(lambda: run_server(kit))


@federate.command()
def site(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The site's kit.")],
    data: Annotated[
        Path | None,
        typer.Option(help="The examples: csv, tsv, json, jsonl, parquet or arrow file, or folder."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a site of a federation until it is stopped.

    DIR/site.yaml contains the site's settings, and the path of the data if --data is not given.

    Example: fedmerge federate site north --data tickets.csv
    """
    from fedmerge_peft.errors import FederateError
    from fedmerge_peft.sites.config import SITE_FILE, SiteSettings, load_kit_recipe, recipe_refusal
    from fedmerge_peft.sites.prepare import check_installed, find_kit
    from fedmerge_peft.sites.supervisor import run_site
    from fedmerge_peft.util.text import printable

    check_installed()
    kit = find_kit(directory, "")
    settings = SiteSettings.read(kit / SITE_FILE).with_data(
        data.absolute() if data is not None else None
    )
    if settings.data is None:
        raise FederateError(
            f"no data: use fedmerge federate site {shlex.quote(str(directory))} --data FILE, "
            f"or set data: {{path: FILE}} in {kit / SITE_FILE}"
        )
    if not trust_remote_code:
        _refuse_code(kit / SITE_FILE, settings.allow)
    recipe = load_kit_recipe(kit, settings.allow)
    settings.apply_to(recipe)
    if reason := recipe_refusal(recipe, recipe, settings.allow):
        raise FederateError(
            f"the recipe in the kit exceeds the limits in {kit / SITE_FILE}: {reason}; "
            "change the limit to allow it"
        )

    from fedmerge_peft.sites.flare.site_kit import secure_site_kit

    name = secure_site_kit(kit, kit / Path(settings.data.path).expanduser())
    print(printable(f"site {name}; audit log: {kit}/audit.jsonl; log: {kit}/site.log"), flush=True)
    _run_until_stopped(lambda: run_site(kit, name, settings))


@federate.command()
def run(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The operator's kit, or the folder written by prepare."),
    ],
    wait: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait for all sites; after that, --min-sites suffice."),
    ] = 600,
    min_sites: Annotated[
        int, typer.Option(min=1, help="Smallest number of connected sites to start a job with.")
    ] = 1,
    connect_timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to wait for --min-sites sites. Default: no limit."),
    ] = None,
    reconnect_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that does not respond.")
    ] = 300,
    quiet: Quiet = False,
) -> None:
    """Run a federation to its end. If it is interrupted, the same command continues it.

    Example: fedmerge federate run federation --wait 60
    """
    from fedmerge_peft.sites.prepare import check_installed, find_kit

    check_installed()
    kit = find_kit(directory, "operator")

    from fedmerge_peft.sites.flare.operator import SiteWait, run

    _silence_flare()
    sites = SiteWait(wait, min_sites, connect_timeout)
    outcome = run(kit, _reporter(quiet), wait=sites, reconnect_timeout=reconnect_timeout)
    _print_outcome(
        outcome,
        "run, in the server's kit",
        f"fedmerge federate run {shlex.quote(str(directory))}",
    )


@federate.command()
def status(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The operator's kit, or the folder written by prepare."),
    ],
) -> None:
    """Show the connected sites, the running job and its last events.

    Example: fedmerge federate status federation
    """
    from fedmerge_peft.sites.config import FederationFile
    from fedmerge_peft.sites.prepare import check_installed, find_kit
    from fedmerge_peft.util.text import printable

    check_installed()
    kit = find_kit(directory, "operator")

    from fedmerge_peft.sites.flare.operator import federation_status

    state = federation_status(kit)
    in_job = state.get("sites", []) if state["job"] else []
    for name in FederationFile.read(kit).sites:
        connection = "connected" if name in state["connected"] else "away"
        print(f"{name:<24}{connection}{', in the running job' if name in in_job else ''}")
    print(f"job: {state['job'] or 'none'}")
    for line in state.get("events", [])[-5:]:
        print(printable(line))


@federate.command()
def stop(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The operator's kit, or the folder written by prepare."),
    ],
    now: Annotated[
        bool, typer.Option("--now", help="Stop at once; the current round is lost.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also shut down the server and all sites.")
    ] = False,
) -> None:
    """Stop a federation after the current round; fedmerge federate run continues it.

    Example: fedmerge federate stop federation
    """
    from fedmerge_peft.sites.prepare import check_installed, find_kit

    check_installed()
    kit = find_kit(directory, "operator")

    from fedmerge_peft.sites.flare.operator import stop

    stop(kit, _reporter(quiet=False), now=now, everything=everything)


@federate.command()
def rehearse(
    recipe: RecipeSource,
    overrides: Overrides = None,
    sites: Annotated[
        int, typer.Option(min=1, help="Number of sites, each with some of the recipe's clients.")
    ] = 3,
    out: Annotated[
        Path | None, typer.Option(help="A new folder. Default: rehearsals/NAME (recipe's name).")
    ] = None,
    wire_dtype: WireDtype = "float32",
    segment: Segment = 10,
    deadline: Deadline = 3600,
    quiet: Quiet = False,
) -> None:
    """Run a federation on this machine: server and sites as processes, over loopback and TLS.

    Example: fedmerge federate rehearse smoke --sites 3
    """
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.sites.prepare import check_installed
    from fedmerge_peft.util.text import printable

    check_installed()
    loaded = Recipe.load(recipe, overrides or [])
    folder = out if out is not None else Path("rehearsals") / project_name(loaded.name)

    from fedmerge_peft.sites.rehearse import prepare_rehearsal, run_rehearsal

    federation = prepare_rehearsal(
        loaded, sites, folder, wire_dtype=wire_dtype, segment=segment, deadline=deadline
    )
    report = _reporter(quiet)
    report(
        f"prepared {printable(str(folder))}; starting a server and {sites} site{'s' * (sites > 1)}"
    )
    _silence_flare()
    _print_outcome(
        run_rehearsal(folder, federation, report),
        str(folder / "server" / "run"),
        "fedmerge federate server, fedmerge federate site for each site, and fedmerge federate "
        f"run, each with its kit in {shlex.quote(str(folder))}",
    )


def _refuse_code(path: Path, limits: SiteLimits) -> None:
    """Raise ``FederateError`` if a site's settings allow code from outside this package."""
    from fedmerge_peft.errors import FederateError
    from fedmerge_peft.util.text import printable

    allowed = [
        *["code that comes with a model (allow.remote_code)"] * limits.remote_code,
        *[f"the plugin {name} (allow.plugins)" for name in limits.plugins],
    ]
    if allowed:
        raise FederateError(
            printable(
                f"{path}: allows {' and '.join(allowed)} to run here; the file comes with the "
                "kit, so confirm this with --trust-remote-code"
            )
        )


def _reporter(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints the text of an event, or one that does nothing if ``quiet``."""
    from fedmerge_peft.util.text import printable

    def report(text: str) -> None:
        if not quiet:
            print("\n".join(map(printable, text.split("\n"))), flush=True)

    return report


def _print_outcome(outcome: dict[str, Any], run: str, resume: str) -> None:
    """Print the result and the run directory. Raise ``FederateError`` for a failed run."""
    from fedmerge_peft.errors import FederateError
    from fedmerge_peft.util.text import printable

    done = f"{outcome['rounds']} of {outcome['total']} rounds are done"
    if outcome["rounds"] is None:
        done = "all completed rounds are kept"
    if outcome["state"] == "failed":
        raise FederateError(f"{outcome['error']}\n{done}; to continue: {resume}")
    print(printable(f"{outcome['state']}: {done}. Run directory: {run}"))
    if outcome["state"] == "stopped":
        print(printable(f"to continue: {resume}"))


def _run_until_stopped(serve: Callable[[], None]) -> None:
    from fedmerge_peft.sites.supervisor import StoppedBySignal

    try:
        serve()
    except StoppedBySignal as stopped:
        raise typer.Exit(stopped.code) from None


def _silence_flare() -> None:
    """Keep FLARE's log messages off the terminal."""
    import logging

    logging.getLogger("nvflare").setLevel(logging.CRITICAL)

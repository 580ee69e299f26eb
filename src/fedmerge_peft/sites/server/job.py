"""One job of a federation at the server: from the last checkpoint through a segment of rounds; in the end, everyone's adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from safetensors.torch import load_file

from fedmerge_peft.errors import FedMergeError
from fedmerge_peft.federation.callbacks import Callback
from fedmerge_peft.federation.federate import resume_run, run_recipe
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory, with_baselines
from fedmerge_peft.runs.record import RoundRecord
from fedmerge_peft.serving.export import export_client
from fedmerge_peft.sites.config import RECIPE, RUN, Federation
from fedmerge_peft.sites.server.engine import RemoteEngine, Transport
from fedmerge_peft.sites.server.roster import Roster, reconcile

log = logging.getLogger(__name__)

State = Literal["ended", "segment", "stopped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    state: State
    """ended: all rounds are done; segment: there are more, for the next job; stopped: somebody asked to stop; failed: see ``error``."""
    rounds: int
    """Rounds on the disk, those of baselines included."""
    total: int
    """Rounds that the recipe asks for, those of baselines included."""
    error: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    """Sites that took no part, and why."""
    adapters: dict[str, str | None] = field(default_factory=dict)
    """Clients whose adapters were sent in the end; why not, where one did not arrive."""


class _Pause(Exception):  # noqa: N818 (no error: the job ends here, and the run goes on)
    def __init__(self, state: State) -> None:
        self.state = state


def run_job(
    kit: Path, transport: Transport, stop: Callable[[], State | None], tell: Callable[[str], None]
) -> Outcome:
    """Do a job: enrol the sites, go on from the last checkpoint, and end after a segment of rounds or with the run.

    Args:
        kit: The server's; its ``run`` is the run directory.
        transport: The way to the sites.
        stop: Asked after each round; a state ends the job there.
        tell: Is told a line for each event that a person should see.

    Returns:
        How it ended. What failed stands in it, and is not raised; finished rounds are on the disk in any case.
    """
    absent: dict[str, str] = {}
    try:
        federation, recipe = Federation.read(kit), Recipe.load(kit / RECIPE)
        roster, run = Roster.read(kit), kit / RUN
        engine = RemoteEngine.enrol(recipe, federation, roster, transport)
        absent |= engine.absent
        roster.write(kit)
        reconcile(run, federation, roster)
        here = [site for site in federation.sites if site not in absent]
        tell(
            f"sites: {', '.join(here)}"
            + "".join(f"; without {site} ({why})" for site, why in absent.items())
        )
        try:
            _continue_run(recipe, run, engine, federation.segment, stop, tell)
        except _Pause as pause:
            return _outcome(kit, pause.state, absent=absent)
        return _outcome(
            kit, "ended", absent=absent, adapters=_hand_over(RunDirectory.open(run), engine, tell)
        )
    except FedMergeError as error:
        return _outcome(kit, "failed", error=str(error), absent=absent)
    except Exception as error:
        log.exception("the job failed")
        return _outcome(kit, "failed", error=f"{type(error).__name__}: {error}", absent=absent)


def _continue_run(
    recipe: Recipe,
    run: Path,
    engine: RemoteEngine,
    segment: int,
    stop: Callable[[], State | None],
    tell: Callable[[str], None],
) -> None:
    done = 0

    def on_round(record: RoundRecord) -> None:
        nonlocal done
        done += 1
        tell(
            str(record) + "".join(f"\n  {client}: {why}" for client, why in record.failures.items())
        )
        if state := stop():
            raise _Pause(state)
        if done >= segment and record.round < record.rounds:
            raise _Pause("segment")

    callbacks = [Callback(on_round=on_round)]
    if not (run / RECIPE).exists():
        run_recipe(recipe, run, engine=engine, callbacks=callbacks)
        return
    found = RunDirectory.open(run)
    if found.ended and found.recipe.rounds >= recipe.rounds:
        return
    overrides = [f"rounds={recipe.rounds}"] if recipe.rounds > found.recipe.rounds else []
    resume_run(run, overrides, engine=engine, callbacks=callbacks)


def _hand_over(
    run: RunDirectory, engine: RemoteEngine, tell: Callable[[str], None]
) -> dict[str, str | None]:
    """Give each client its adapter; why one did not arrive, by client. Methods whose clients have no adapter of the layout give none."""
    if run.recipe.strategy.name in ("fedem", "flora"):
        tell(
            f"{run.recipe.strategy.name}: clients have no single adapter of the run's rank; fedmerge export has what there is"
        )
        return {}
    sent: dict[str, str | None] = {}
    for client in run.client_names:
        with TemporaryDirectory(prefix="fedmerge-") as scratch:
            folder = export_client(run, client, Path(scratch) / "adapter")
            documents = {
                name: (folder / name).read_text(encoding="utf-8")
                for name in ("README.md", "weights.json")
            }
            sent[client] = engine.hand_over(
                client, load_file(folder / "adapter_model.safetensors"), documents
            )
    missing = {client: why for client, why in sent.items() if why is not None}
    tell(
        f"adapters sent to {len(sent) - len(missing)} of {len(sent)} clients"
        + "".join(f"\n  {c}: {why}" for c, why in missing.items())
    )
    return sent


def progress(kit: Path) -> tuple[int, int]:
    """Rounds on the disk of a server's kit, and rounds that are asked for, those of baselines included."""
    recipe, run = Recipe.load(kit / RECIPE), kit / RUN
    pairs = [
        (len(RunDirectory(path).records), one.rounds) for one, path in with_baselines(recipe, run)
    ]
    return sum(done for done, _ in pairs), sum(total for _, total in pairs)


def _outcome(
    kit: Path,
    state: State,
    *,
    error: str | None = None,
    absent: dict[str, str],
    adapters: dict[str, str | None] | None = None,
) -> Outcome:
    try:
        done, total = progress(kit)
    except FedMergeError:
        done = total = 0
    return Outcome(state, done, total, error, absent, adapters or {})

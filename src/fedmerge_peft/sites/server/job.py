"""One job at the server: run a segment of rounds; after the run's last round, send adapters."""

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
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.federation.tuning import describe
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory, with_baselines
from fedmerge_peft.runs.record import RoundRecord
from fedmerge_peft.serving.export import export_client
from fedmerge_peft.sites.config import RECIPE_FILE, RUN_FOLDER, FederationFile
from fedmerge_peft.sites.server.engine import RemoteEngine
from fedmerge_peft.sites.server.roster import Roster, update_run_clients
from fedmerge_peft.sites.server.transport import JobStopped, Transport

log = logging.getLogger(__name__)

State = Literal["ended", "paused", "stopped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """Result of a job."""

    state: State
    """ended: the run has ended, after all rounds or early. paused: the next job continues the run.
    stopped: the operator stopped the job. failed: ``error`` contains the reason."""
    rounds: int
    """Rounds on disk, including those of the baselines; 0 if the run cannot be read."""
    total: int
    """Rounds of the recipe, including those of the baselines; 0 if the run cannot be read."""
    error: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    """Sites that could not take part in the job, with the reasons. Empty if the job ended during
    enrollment; if no site could take part, ``error`` has the reasons."""
    adapters: dict[str, str | None] = field(default_factory=dict)
    """Result for each client at the end of the run: None if its site stored the adapter, else the
    reason. Empty before the end, and if no adapters were sent."""


class _EndOfJob(Exception):  # noqa: N818 (a normal end, not an error)
    def __init__(self, state: State) -> None:
        self.state = state


def run_job(
    kit: Path,
    transport: Transport,
    requested_state: Callable[[], State | None],
    report: Callable[[str], None],
) -> Outcome:
    """Enroll the sites, and start or continue the run; at its end, send the adapters.

    A job runs one segment of rounds; ``_continue_run`` describes where it pauses.

    Args:
        kit: The server's kit; its ``run`` is the run directory.
        transport: The connection to the sites.
        requested_state: Called after each round. If it returns a state, the job ends in this state.
        report: Called with a line of text for each event that the operator should see.

    Returns:
        The outcome. Errors are part of the outcome and are not raised; completed rounds are on disk
        in any case.
    """
    absent: dict[str, str] = {}
    try:
        federation, recipe = FederationFile.read(kit), Recipe.load(kit / RECIPE_FILE)
        roster, run = Roster.read(kit), kit / RUN_FOLDER
        engine = RemoteEngine.enroll(recipe, federation, roster, transport)
        absent |= engine.absent
        roster.write(kit)
        update_run_clients(run, federation, roster)
        present = [site for site in federation.sites if site not in absent]
        report(
            f"sites: {', '.join(present)}"
            + "".join(f"; without {site} ({reason})" for site, reason in absent.items())
        )
        try:
            _continue_run(recipe, run, engine, federation.segment, requested_state, report)
        except _EndOfJob as end:
            return _outcome(kit, end.state, absent=absent)
        adapters = _send_adapters(RunDirectory.open(run), engine, report)
        return _outcome(kit, "ended", absent=absent, adapters=adapters)
    except JobStopped:
        return _outcome(kit, "stopped", absent=absent)
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
    requested_state: Callable[[], State | None],
    report: Callable[[str], None],
) -> None:
    """Start or continue the run. Raises ``_EndOfJob`` after ``segment`` rounds, or on request.

    If the segment ends with the last round of a method, the job also runs the first round of the
    next method, if any.
    """
    done = 0

    def on_start(federation: Federation, started: RunDirectory) -> None:
        if federation.completed == 0 and started.path == run:
            for line in describe(started.decisions):
                report(line)

    def on_round(record: RoundRecord) -> None:
        nonlocal done
        done += 1
        failures = "".join(f"\n  {client}: {why}" for client, why in record.failures.items())
        report(f"{record}{failures}")
        if state := requested_state():
            raise _EndOfJob(state)
        if done >= segment and record.round < record.rounds:
            raise _EndOfJob("paused")

    callbacks = [Callback(on_start=on_start, on_round=on_round)]
    if not (run / RECIPE_FILE).exists():
        run_recipe(recipe, run, engine=engine, callbacks=callbacks)
        return
    directory = RunDirectory.open(run)
    if directory.ended and directory.recipe.rounds >= recipe.rounds:
        return
    overrides = [f"rounds={recipe.rounds}"] if recipe.rounds > directory.recipe.rounds else []
    resume_run(directory, overrides, engine=engine, callbacks=callbacks)


def _send_adapters(
    run: RunDirectory, engine: RemoteEngine, report: Callable[[str], None]
) -> dict[str, str | None]:
    """Send each client its adapter.

    Nothing is sent if a client has several adapters, or adapters of a higher rank than the run's.

    Returns:
        The result for each client: None if its site stored the adapter, else the reason. Empty if
        nothing is sent.
    """
    strategy = run.recipe.strategy
    if not strategy.single_adapter:
        report(
            f"{strategy.name}: a client predicts with several adapters, so none was sent; on the "
            "server's machine, use fedmerge export RUN --soup"
        )
        return {}
    if strategy.adds_to_backbone:
        report(
            f"{strategy.name}: the run changes the backbone, so the final adapters have a higher "
            "rank, and none was sent; on the server's machine, use fedmerge export RUN --all"
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
            sent[client] = engine.send_adapter(
                client, load_file(folder / "adapter_model.safetensors"), documents
            )
    missing = {client: reason for client, reason in sent.items() if reason is not None}
    report(
        f"adapters sent to {len(sent) - len(missing)} of {len(sent)} clients"
        + "".join(f"\n  {client}: {reason}" for client, reason in missing.items())
    )
    return sent


def progress(kit: Path) -> tuple[int, int]:
    """Return the numbers of rounds on disk and in the recipe, including those of baselines."""
    recipe, run = Recipe.load(kit / RECIPE_FILE), kit / RUN_FOLDER
    pairs = [
        (len(RunDirectory(path).records), part.rounds) for part, path in with_baselines(recipe, run)
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

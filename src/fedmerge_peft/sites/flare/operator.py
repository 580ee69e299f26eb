"""The operator's side: jobs are submitted one after another, each a segment of rounds, until the run has ended."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvflare.fuel.flare_api.api_spec import (
    InternalError,
    JobNotFound,
    JobNotRunning,
    NoConnection,
    NoReply,
    SessionClosed,
)
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import OPERATOR, Federation
from fedmerge_peft.sites.flare.names import CONTROLLER, EXECUTOR, OUTCOME, TOPIC

log = logging.getLogger(__name__)

_POLL = 0.5
"""Seconds between two looks at a job."""
_LOOK_FOR_SITES = 5.0
"""Seconds between two looks for sites that came late."""
_ATTEMPTS = 3
"""Jobs in a row that may leave nothing."""
_FETCH = 0.2
"""Seconds between two times that a site asks for work."""


class Lost(FederateError):  # noqa: N818 (the server is)
    """The server does not answer."""


class _NoOutcomeError(FederateError):
    """A job ended and left nothing: its process at the server failed before ours began, or was killed."""


@contextmanager
def session(kit: Path, patience: float = 10.0) -> Iterator[Session]:
    """A connection as the operator. Raises ``Lost`` where no server of this federation answers."""
    federation = Federation.read(kit)
    with _quiet():
        try:
            opened = new_secure_session(
                OPERATOR, str(kit.resolve()), timeout=patience, auto_login_max_tries=2
            )
        except Exception as error:
            raise Lost(
                f"{federation.host}:{federation.port}: no server of this federation answers ({_said(error)}); "
                "start it with: fedmerge federate server DIR"
            ) from error
    try:
        yield opened
    finally:
        with _quiet():
            opened.close()


def run(
    kit: Path,
    tell: Callable[[str], None],
    *,
    wait: float,
    least: int,
    patience: float,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Submit segment after segment until the run has ended, was stopped, or failed.

    Args:
        kit: The operator's.
        tell: Is told a line for each event that a person should see.
        wait: Seconds to wait for all sites, before it begins with those that are there.
        least: With how many sites it begins, at the least; below, it goes on waiting.
        patience: Seconds that a server which does not answer may take to come back.
        watch: Called all the time; what it raises ends the waiting.

    Returns:
        The last job's ``outcome.json``.

    Raises:
        FederateError: The server does not come back, or a job left no outcome.
    """
    seen: float = time.monotonic()
    failed = 0
    while True:
        try:
            with session(kit) as opened:
                outcome = _segment(opened, kit, tell, wait, least, watch)
            if outcome["state"] != "segment":
                return outcome
            seen, failed = time.monotonic(), 0
        except _NoOutcomeError as error:
            failed += 1
            if failed == _ATTEMPTS:
                raise
            tell(f"{error}. Submitting another")
        except Lost:
            if time.monotonic() - seen > patience:
                raise
            time.sleep(_POLL)
        except (NoConnection, SessionClosed) as error:
            tell(f"the server does not answer ({_said(error)}); waiting for it")
            seen = time.monotonic()


def look(kit: Path) -> dict[str, Any]:
    """Who is connected, what jobs run, and how far the running one is. Raises ``FederateError``."""
    with session(kit) as opened, _quiet():
        jobs = _running(opened)
        said = _ask(opened, jobs[0], {"do": "look"}) if jobs else {}
        return {"connected": _connected(opened), "job": jobs[0] if jobs else None, **said}


def stop(kit: Path, *, now: bool, everything: bool) -> str:
    """Stop after the round that runs, or at once; with ``everything`` shut server and sites down too. What was done, in words."""
    done = []
    with session(kit) as opened, _quiet():
        for job in _running(opened):
            if now:
                opened.abort_job(job)
            else:
                opened.do_app_command(job, TOPIC, {"do": "stop"})
            done.append(f"job {job} stops {'at once' if now else 'after this round'}")
        if everything:
            deadline = time.monotonic() + Federation.read(kit).deadline
            while _running(opened) and time.monotonic() < deadline:
                time.sleep(_POLL)
            opened.shutdown("all", wait=False)
            done.append("server and sites shut down")
    return "; ".join(done) or "no job runs"


def _segment(
    opened: Session,
    kit: Path,
    tell: Callable[[str], None],
    wait: float,
    least: int,
    watch: Callable[[], None],
) -> dict[str, Any]:
    """Wait for sites, submit a job, follow it, fetch what it left."""
    federation, begun = Federation.read(kit), _begun(opened)
    for job in _running(opened):
        tell(f"waiting for job {job}, which runs already")
        _follow(opened, job, begun, federation, tell, watch)
    _await_sites(opened, federation, tell, wait, least, watch)
    with TemporaryDirectory(prefix="fedmerge-") as scratch, _quiet():
        job = opened.submit_job(str(write_job(Path(scratch) / federation.project)))
    told = _follow(opened, job, begun, federation, tell, watch)
    outcome = _outcome(opened, job)
    for line in outcome.pop("told")[told:]:
        tell(line)
    return outcome


def _await_sites(
    opened: Session,
    federation: Federation,
    tell: Callable[[str], None],
    wait: float,
    least: int,
    watch: Callable[[], None],
) -> None:
    begin, said = time.monotonic(), False
    while True:
        watch()
        missing = [site for site in federation.sites if site not in (here := _connected(opened))]
        here = [site for site in federation.sites if site in here]
        if not missing or (len(here) >= least and time.monotonic() - begin > wait):
            return
        if not said and time.monotonic() - begin > 5:
            tell(f"waiting for {', '.join(missing)}")
            said = True
        time.sleep(_POLL)


def _follow(
    opened: Session,
    job: str,
    begun: float,
    federation: Federation,
    tell: Callable[[str], None],
    watch: Callable[[], None],
) -> int:
    """Pass on what a job tells until it has ended; how many lines. A site that comes in has it end after its round, for the next.

    Raises ``NoConnection`` where the server has been started anew since it had ``begun``: it calls jobs running that ran before.
    """
    told, looked = 0, time.monotonic()
    while True:
        watch()
        with _quiet():
            status = str(opened.get_job_meta(job).get("status", ""))
        if status.startswith("FINISHED"):
            return told
        if _begun(opened) != begun:
            raise NoConnection(f"job {job} went down with it")
        if status == "RUNNING":
            said = _ask(opened, job, {"do": "look", "from": told})
            for line in said.get("told", []):
                tell(line)
                told += 1
            if (
                said
                and told
                and said["wanted"] is None
                and time.monotonic() - looked > _LOOK_FOR_SITES
            ):
                looked = time.monotonic()
                late = [site for site in _idle(opened) if site in federation.sites]
                if late:
                    tell(f"{', '.join(late)} came in, and takes part after this round")
                    _ask(opened, job, {"do": "pause"})
        time.sleep(_POLL)


def _ask(opened: Session, job: str, command: dict[str, Any]) -> dict[str, Any]:
    """What a job answers; nothing where it is not up yet, or has just ended."""
    with _quiet():
        try:
            return dict(opened.do_app_command(job, TOPIC, command))
        except (InternalError, JobNotFound, JobNotRunning, NoReply) as error:
            log.debug("the job does not answer: %s", error)
            return {}


def _outcome(opened: Session, job: str) -> dict[str, Any]:
    """What a job left behind. Raises ``FederateError`` where that is nothing."""
    with TemporaryDirectory(prefix="fedmerge-") as scratch:
        with _quiet():
            status = opened.get_job_meta(job).get("status", "")
            folder = opened.download_job_result(job, scratch)
        found = next(Path(folder).rglob(OUTCOME), None) if folder else None
        if found is None:
            raise _NoOutcomeError(
                f"job {job} ended as {status} and left no {OUTCOME}; the server's log.txt has more"
            )
        outcome: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    shutil.rmtree(Path(folder), ignore_errors=True)
    return outcome


def _connected(opened: Session) -> list[str]:
    with _quiet():
        return [client.name for client in opened.get_connected_client_list()]


def _idle(opened: Session) -> list[str]:
    """Sites that are connected and in no job: they came after it began, or were started again since."""
    with _quiet():
        return [
            str(each["client_name"])
            for each in opened.get_client_job_status() or []
            if each.get("status") == "no_jobs"
        ]


def _begun(opened: Session) -> float:
    """When the server was started."""
    with _quiet():
        return float(opened.get_system_info().server_info.start_time)


def _running(opened: Session) -> list[str]:
    """Jobs that the server runs now. Its list of jobs also calls those running that ran when it was killed."""
    with _quiet():
        return [str(job.job_id) for job in opened.get_system_info().job_info]


def write_job(folder: Path) -> Path:
    """A job in FLARE's form. It names two classes, and carries nothing: recipe and data lie where they are used."""
    server = {
        "format_version": 2,
        "server": {"heart_beat_timeout": 600, "task_request_interval": _FETCH},
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
        "workflows": [{"id": "rounds", "path": CONTROLLER, "args": {}}],
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": {"path": EXECUTOR, "args": {}}}],
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
    }
    meta = {
        "name": "fedmerge",
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"app": ["@ALL"]},
    }
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    (config / "config_fed_server.json").write_text(json.dumps(server, indent=2), encoding="utf-8")
    (config / "config_fed_client.json").write_text(json.dumps(client, indent=2), encoding="utf-8")
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """FLARE's client prints as it goes."""
    with redirect_stdout(StringIO()):
        yield


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

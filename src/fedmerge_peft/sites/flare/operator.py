"""Commands of the operator: run a federation, show its status, and stop it.

The operator submits one job after another until the run ends. Each job runs a segment of the
rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from nvflare.fuel.flare_api.api_spec import (
    InternalError,
    JobNotDone,
    JobNotFound,
    JobNotRunning,
    NoConnection,
    NoReply,
)
from nvflare.fuel.flare_api.flare_api import Session

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import FederationFile
from fedmerge_peft.sites.flare.job_files import write_job
from fedmerge_peft.sites.flare.names import OUTCOME_FILE, TOPIC
from fedmerge_peft.sites.flare.operator_files import download_outcome, read_status
from fedmerge_peft.sites.flare.session import (
    ConnectionLostError,
    ServerUnreachableError,
    no_output,
    open_session,
)
from fedmerge_peft.util.text import count_of

log = logging.getLogger(__name__)

_ABORTED = "FINISHED:ABORTED"
"""Status of a job that the operator has stopped at once."""
_POLL_INTERVAL = 0.5
"""Seconds between two checks of a job, the sites or the server."""
_SITE_CHECK_INTERVAL = 5.0
"""Seconds between two checks for sites that joined late."""
_FIRST_REPORT, _REPORT_INTERVAL = 5.0, 60.0
"""Seconds before the first report on sites that are not connected, and between two reports."""
_MAX_ATTEMPTS = 3
"""Number of consecutive jobs without an outcome after which ``run`` fails."""
_FETCH_TIME = 3.0
"""Seconds between the end of a job and a shutdown, in which ``run`` can fetch the outcome."""
_END_TIMEOUT = 120.0
"""Seconds that a job may take to end after its last round."""


class SiteWait(NamedTuple):
    """Conditions under which a job starts without all sites, or not at all."""

    all_sites: float
    """Seconds to wait for all sites; after that, ``min_sites`` connected sites suffice."""
    min_sites: int
    """Smallest number of connected sites with which a job starts."""
    timeout: float | None = None
    """Seconds to wait for ``min_sites`` connected sites; None to wait without end."""


class _NoOutcomeError(FederateError):
    """A job ended without an outcome: its process failed to start, or was killed."""


def run(
    kit: Path,
    report: Callable[[str], None],
    *,
    wait: SiteWait,
    reconnect_timeout: float,
    on_poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Submit one job after another until the run ends, fails or is stopped.

    Args:
        kit: The operator's kit.
        report: Called with a line of text for each event that the operator should see.
        wait: Wait for sites before each job.
        reconnect_timeout: Seconds to wait for a server that does not respond.
        on_poll: Called at every check of a job or the sites; an exception that it raises ends the
            function.

    Returns:
        The last job's ``outcome.json`` without ``events``. If the job was stopped at once and has
        no such file, only three keys are present: ``state`` is ``stopped``, and ``rounds`` and
        ``total`` are None.

    Raises:
        FederateError: The server remains unreachable or refuses a request, too few sites connect,
            or several consecutive jobs left no outcome.
    """
    last_contact: float = time.monotonic()
    failures = 0
    while True:
        try:
            with open_session(kit) as session:
                outcome = _run_segment(session, kit, report, wait, on_poll)
            if outcome["state"] != "paused":
                return outcome
            last_contact, failures = time.monotonic(), 0
        except _NoOutcomeError as error:
            failures += 1
            if failures == _MAX_ATTEMPTS:
                raise
            report(f"{error}. Submitting another job")
        except ServerUnreachableError:
            if time.monotonic() - last_contact > reconnect_timeout:
                raise
            time.sleep(_POLL_INTERVAL)
        except ConnectionLostError as error:
            report(f"{error}; waiting for it")
            last_contact = time.monotonic()


def federation_status(kit: Path) -> dict[str, Any]:
    """Return the sites that are connected, the id of the running job, and the job's status.

    The keys are ``connected``, ``job`` (None if no job is running) and, if the job replies, the
    fields of ``JobStatus``.

    Raises:
        FederateError: The server does not respond, or refuses a request.
    """
    with open_session(kit) as session, no_output():
        jobs = _running_jobs(session)
        state = _send_command(session, jobs[0], {"command": "status"}) if jobs else {}
        return {
            "connected": _connected_sites(session),
            "job": jobs[0] if jobs else None,
            **state,
        }


def stop(kit: Path, report: Callable[[str], None], *, now: bool, everything: bool) -> None:
    """Stop the unfinished jobs.

    Args:
        kit: The operator's kit.
        report: Called with a line of text for each action.
        now: Stop at once, without waiting for the end of the round, which then has no effect.
        everything: After the jobs have ended, shut down the server and all sites too.

    Raises:
        FederateError: The server does not respond or refuses a request, or a job does not reply or
            end in time. After the error of a job, server and sites keep running.
    """
    advice = (
        f"{'; server and sites were not shut down' if everything else ''}. Repeat the command"
        f"{'' if now else ', or add --now, which loses the current round'}"
    )
    with open_session(kit) as session:
        jobs = _unfinished_jobs(session)
        end = time.monotonic() + FederationFile.read(kit).deadline + _END_TIMEOUT
        for job in jobs:
            _request_stop(session, job, end, advice, now=now)
            report(f"job {job} stops {'at once' if now else 'after this round'}")
        if not jobs:
            report("no job is running")
        if everything:
            for job in jobs:
                _await(partial(_has_finished, session, job), f"job {job} still runs{advice}", end)
            time.sleep(_FETCH_TIME if jobs else 0.0)
            _await(lambda: _shut_down(session), f"the server is still ending a job{advice}", end)
            report("server and sites shut down")


def _request_stop(session: Session, job: str, end: float, advice: str, *, now: bool) -> None:
    """Abort a job (``now``), or repeat the command ``stop`` until the job replies or has finished.

    Raises ``FederateError`` if the job has done neither by the time ``end`` (``time.monotonic``).
    """

    def request() -> bool:
        if now:
            with no_output():
                session.abort_job(job)
            return True
        return bool(_send_command(session, job, {"command": "stop"})) or _has_finished(session, job)

    _await(request, f"job {job} does not reply{advice}", end)


def _shut_down(session: Session) -> bool:
    """Shut down the server and all sites; return False if the server is still ending a job."""
    try:
        with no_output():
            session.shutdown("all", wait=False)
    except JobNotDone:
        return False
    return True


def _await(condition: Callable[[], bool], error: str, end: float) -> None:
    """Wait until a condition holds.

    Raises ``FederateError`` with the text ``error`` if the condition does not hold by the time
    ``end`` (``time.monotonic``).
    """
    while not condition():
        if time.monotonic() > end:
            raise FederateError(error)
        time.sleep(_POLL_INTERVAL)


def _run_segment(
    session: Session,
    kit: Path,
    report: Callable[[str], None],
    wait: SiteWait,
    on_poll: Callable[[], None],
) -> dict[str, Any]:
    """Wait for jobs that already run, and for sites; then run a job, and return its outcome."""
    federation, server_start = FederationFile.read(kit), _server_start_time(session)
    for job in _running_jobs(session):
        report(f"waiting for job {job}, which is already running")
        _follow_job(session, job, server_start, federation, report, on_poll)
    _await_sites(session, federation, report, wait, on_poll)
    with TemporaryDirectory(prefix="fedmerge-") as scratch, no_output():
        job = session.submit_job(str(write_job(Path(scratch) / federation.project)))
    reported = _follow_job(session, job, server_start, federation, report, on_poll)
    outcome = _fetch_outcome(session, job)
    for line in outcome.pop("events")[reported:]:
        report(line)
    return outcome


def _await_sites(
    session: Session,
    federation: FederationFile,
    report: Callable[[str], None],
    wait: SiteWait,
    on_poll: Callable[[], None],
) -> None:
    """Wait until enough sites are connected, and report each minute which ones are missing.

    Raises ``FederateError`` if there are too few after ``wait.timeout``.
    """
    start, next_report = time.monotonic(), _FIRST_REPORT
    total = len(federation.sites)
    while True:
        on_poll()
        connected = _connected_sites(session)
        missing = [site for site in federation.sites if site not in connected]
        present, waited = total - len(missing), time.monotonic() - start
        needed = total if waited <= wait.all_sites else min(wait.min_sites, total)
        if present >= needed:
            return
        state = f"{present} of {count_of(total, 'site')} connected"
        if wait.timeout is not None and waited > wait.timeout and present < wait.min_sites:
            raise FederateError(
                f"{state} after {waited:.0f} s, and a job needs {min(wait.min_sites, total)}; "
                f"start fedmerge federate site at {join_values(missing)}, or lower --min-sites"
            )
        if waited > next_report:
            report(f"{state}, and a job starts with {needed}; waiting for {join_values(missing)}")
            next_report = waited + _REPORT_INTERVAL
        time.sleep(_POLL_INTERVAL)


def _follow_job(
    session: Session,
    job: str,
    server_start: float,
    federation: FederationFile,
    report: Callable[[str], None],
    on_poll: Callable[[], None],
) -> int:
    """Report a job's events until it ends; return the number of reported lines.

    If a site connects while the job runs, pause the job after the current round, so that the site
    can take part in the next job.

    Raises:
        NoConnection: The server was restarted: ``server_start`` is no longer the start time of its
            process. A restarted server still lists the jobs of the previous process as running.
    """
    reported, last_check = 0, time.monotonic()
    while True:
        on_poll()
        status = _job_status(session, job)
        if status.startswith("FINISHED"):
            return reported
        if _server_start_time(session) != server_start:
            raise NoConnection(f"job {job} ended with the server's process")
        if status == "RUNNING":
            state = _send_command(session, job, {"command": "status", "from": reported})
            for line in state.get("events", []):
                report(line)
                reported += 1
            if (
                state
                and reported
                and state["requested"] is None
                and time.monotonic() - last_check > _SITE_CHECK_INTERVAL
            ):
                last_check = time.monotonic()
                late = [site for site in _idle_sites(session) if site in federation.sites]
                if late:
                    report(f"{', '.join(late)} connected and can join after this round")
                    _send_command(session, job, {"command": "pause"})
        time.sleep(_POLL_INTERVAL)


def _send_command(session: Session, job: str, command: dict[str, Any]) -> dict[str, Any]:
    """Send a command to a job and return its reply.

    The reply is empty if the job is starting or has just ended.
    """
    with no_output():
        try:
            return read_status(session.do_app_command(job, TOPIC, command))
        except (InternalError, JobNotFound, JobNotRunning, NoReply) as error:
            log.debug("the job does not reply: %s", error)
            return {}


def _fetch_outcome(session: Session, job: str) -> dict[str, Any]:
    """Download a job's outcome; for an aborted job without one, return the state ``stopped``.

    Raises ``FederateError`` if a job that was not aborted has no outcome.
    """
    with no_output():
        status = session.get_job_meta(job).get("status", "")
        outcome = download_outcome(session, job)
    if outcome is None and status == _ABORTED:
        return {"state": "stopped", "rounds": None, "total": None, "events": []}
    if outcome is None:
        raise _NoOutcomeError(
            f"job {job} ended as {status} without {OUTCOME_FILE}; see the server's log.txt"
        )
    return outcome


def _connected_sites(session: Session) -> list[str]:
    with no_output():
        return [client.name for client in session.get_connected_client_list()]


def _idle_sites(session: Session) -> list[str]:
    """Return connected sites without a job: they joined late, or were restarted."""
    with no_output():
        return [
            str(status["client_name"])
            for status in session.get_client_job_status() or []
            if status.get("status") == "no_jobs"
        ]


def _server_start_time(session: Session) -> float:
    with no_output():
        return float(session.get_system_info().server_info.start_time)


def _job_status(session: Session, job: str) -> str:
    with no_output():
        return str(session.get_job_meta(job).get("status", ""))


def _has_finished(session: Session, job: str) -> bool:
    return _job_status(session, job).startswith("FINISHED")


def _unfinished_jobs(session: Session) -> list[str]:
    """Return the jobs that the server runs now, then the submitted jobs that have not started."""
    with no_output():
        submitted = [
            str(job["job_id"]) for job in session.list_jobs() if job["status"] == "SUBMITTED"
        ]
    running = _running_jobs(session)
    return running + [job for job in submitted if job not in running]


def _running_jobs(session: Session) -> list[str]:
    """Return the jobs that the server runs now.

    The server's job list cannot be used: it also has jobs that were running when the server was
    killed.
    """
    with no_output():
        return [str(job.job_id) for job in session.get_system_info().job_info]

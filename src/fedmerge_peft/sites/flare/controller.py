"""The server's part of a job: the round loop, with NVIDIA FLARE tasks as the transport."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmerge_peft.sites.config import FederationFile
from fedmerge_peft.sites.flare.names import DEADLINE, ERROR, OUTCOME_FILE, PAYLOAD, TOPIC
from fedmerge_peft.sites.flare.workarounds import UniqueList, disable_payload_repr
from fedmerge_peft.sites.server.job import State, run_job
from fedmerge_peft.sites.server.transport import JobStopped, Request
from fedmerge_peft.sites.wire import kind_of
from fedmerge_peft.util.exit_with_parent import exit_with_parent

_POLL_INTERVAL = 0.05
"""Longest wait for a reply between two checks of the abort signal and the time limits, seconds."""
_FETCH_TIMEOUT, _BUSY_FETCH_TIMEOUT = 30.0, 3.0
"""Seconds that a site has to fetch a task: the first if it replied to its previous task with a
message, the second if not."""
_GRACE = 30
"""Seconds by which FLARE's timeout of a task exceeds the deadline."""


class FlareTransport:
    """Transport that sends messages as FLARE tasks, one at a time for each site.

    An idle site fetches its task at once. A site that does not do so is disconnected, or still busy
    with a round that continued without it. After a short timeout, the transport stops waiting for
    such a site; for its first task in a job, the timeout is the deadline. The site rejoins in the
    first round in which it fetches its task in time.
    """

    def __init__(
        self, controller: Controller, fl_ctx: FLContext, abort: Signal, sites: Sequence[str]
    ) -> None:
        self.sites = sites
        self._controller = controller
        self._fl_ctx = fl_ctx
        self._abort = abort
        self._fetch_timeouts: dict[str, float] = {}
        """Seconds that each site has to fetch its next task; a site without an entry has until the
        deadline."""

    def send_and_receive(
        self, requests: Mapping[str, Sequence[Request]], deadline: float
    ) -> Iterator[tuple[str, int, bytes | str]]:
        """Send requests and yield replies; see ``server.transport.Transport``."""
        replies: Queue[tuple[Task, bytes | str]] = Queue()
        waiting = {site: deque(queue) for site, queue in requests.items() if queue}
        pending: dict[str, tuple[int, Task, float]] = {}
        end = time.monotonic() + deadline

        def send(site: str) -> None:
            number, make_payload = waiting[site].popleft()
            task = self._send(site, make_payload(), end - time.monotonic(), replies)
            pending[site] = (number, task, time.monotonic())

        for site in waiting:
            send(site)
        while pending:
            try:
                finished, reply = replies.get(timeout=_POLL_INTERVAL)
            except Empty:
                finished, reply = None, ""
            if self._abort.triggered:  # an abort also produces replies such as "its job ended"
                raise JobStopped
            for site, (number, task, sent) in list(pending.items()):
                if task is finished:
                    del pending[site]
                    replied = isinstance(reply, bytes)
                    self._fetch_timeouts[site] = _FETCH_TIMEOUT if replied else _BUSY_FETCH_TIMEOUT
                    yield site, number, reply
                    if waiting[site]:
                        send(site)
                elif reason := self._timeout_reason(site, task, sent, end, deadline):
                    del pending[site]
                    self._controller.cancel_task(task, fl_ctx=self._fl_ctx)
                    for unsent in (number, *(number for number, _ in waiting[site])):
                        yield site, unsent, reason

    def _timeout_reason(
        self, site: str, task: Task, sent: float, end: float, deadline: float
    ) -> str | None:
        """Return the reason to give up waiting for a site; None to keep waiting."""
        now, fetch_timeout = time.monotonic(), self._fetch_timeouts.get(site, deadline)
        if now > end:
            self._fetch_timeouts[site] = _BUSY_FETCH_TIMEOUT
            return f"it did not reply within {deadline:g} s"
        if not task.client_tasks and now - sent > fetch_timeout:
            self._fetch_timeouts[site] = _BUSY_FETCH_TIMEOUT
            return f"it did not fetch the server's request within {fetch_timeout:g} s"
        return None

    def _send(
        self, site: str, payload: bytes, seconds: float, replies: Queue[tuple[Task, bytes | str]]
    ) -> Task:
        data = Shareable()
        data.update({PAYLOAD: payload, DEADLINE: seconds})
        task = Task(name=kind_of(payload), data=data, timeout=max(1, int(seconds)) + _GRACE)
        task.client_tasks = UniqueList(task.client_tasks)
        task.result_received_cb = partial(_on_result, replies)
        task.task_done_cb = partial(_on_task_done, replies)
        self._controller.send(task, self._fl_ctx, targets=[site])
        return task


def _on_result(
    replies: Queue[tuple[Task, bytes | str]], client_task: ClientTask, fl_ctx: FLContext
) -> None:
    result = client_task.result
    if isinstance(result, Shareable) and isinstance(
        payload := result.get(PAYLOAD), bytes | bytearray | memoryview
    ):
        replies.put((client_task.task, bytes(payload)))
    elif isinstance(result, Shareable) and isinstance(error := result.get(ERROR), str):
        replies.put((client_task.task, error))
    else:
        code = (
            result.get_return_code() if isinstance(result, Shareable) else ReturnCode.EMPTY_RESULT
        )
        replies.put((client_task.task, f"its job returned {code}; see the site's log"))


def _on_task_done(replies: Queue[tuple[Task, bytes | str]], task: Task, fl_ctx: FLContext) -> None:
    if task.completion_status != TaskCompletionStatus.OK:
        replies.put((task, "its job ended"))


class FederationController(Controller):  # type: ignore[misc]
    """Controller of one job: runs a segment of rounds and writes the outcome to the job's files."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.1)
        disable_payload_repr()
        self._requested: State | None = None
        self._events: list[str] = []
        self._sites: list[str] = []

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Register the operator's commands; from now on, exit with the server's main process."""
        exit_with_parent()
        fl_ctx.get_engine().register_app_command(TOPIC, self._handle_command)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the job and write its outcome."""
        engine = fl_ctx.get_engine()
        workspace = engine.get_workspace()
        kit = self._kit(fl_ctx)
        known = FederationFile.read(kit).sites
        self._sites = [client.name for client in engine.get_clients() if client.name in known]
        transport = FlareTransport(self, fl_ctx, abort_signal, self._sites)

        def requested_state() -> State | None:
            return "stopped" if abort_signal.triggered else self._requested

        outcome = run_job(kit, transport, requested_state, self._report)
        folder = Path(workspace.get_run_dir(fl_ctx.get_job_id()))
        temporary = folder / f".{OUTCOME_FILE}.{os.getpid()}"
        document = {**vars(outcome), "events": self._events}
        temporary.write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")
        temporary.replace(folder / OUTCOME_FILE)
        self.log_info(
            fl_ctx,
            f"{outcome.state}: {outcome.rounds} of {outcome.total} rounds. {outcome.error or ''}",
        )

    def _kit(self, fl_ctx: FLContext) -> Path:
        """Return the server's kit, which is FLARE's workspace."""
        return Path(fl_ctx.get_engine().get_workspace().get_root_dir())

    def _report(self, line: str) -> None:
        self._events.append(line)
        self.logger.info(line)

    def _handle_command(self, topic: str, command: Any, fl_ctx: FLContext) -> dict[str, Any]:
        """Execute a command of the operator: ``stop``, ``pause`` or ``status``.

        Return the sites of the job, its events from number ``from`` on, and the state in which the
        operator requested it to end, or None.
        """
        options = command if isinstance(command, dict) else {}
        match options.get("command"):
            case "stop":
                self._requested = "stopped"
            case "pause":
                self._requested = self._requested or "paused"
        return {
            "sites": self._sites,
            "events": self._events[int(options.get("from", 0)) :],
            "requested": self._requested,
        }

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing, because each round is written to disk when it ends."""

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """Log and ignore a reply that arrives after its deadline."""
        self.log_warning(fl_ctx, f"ignored a late reply of {client.name} to {task_name}")

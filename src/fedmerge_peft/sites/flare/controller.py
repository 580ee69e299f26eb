"""What runs in a job at the server: our round loop, with NVIDIA FLARE's tasks for its way to the sites."""

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

from fedmerge_peft.sites.config import Federation
from fedmerge_peft.sites.exit_with_parent import end_with_parent
from fedmerge_peft.sites.flare.names import CONTENT, DEADLINE, ERROR, OUTCOME, TOPIC
from fedmerge_peft.sites.flare.workarounds import Distinct, say_messages_short
from fedmerge_peft.sites.server.engine import Request
from fedmerge_peft.sites.server.job import State, run_job

_LOOK = 0.05
"""Seconds between two looks at a queue."""
_FREE, _BUSY = 30.0, 3.0
"""Seconds to fetch work: of a site that has answered what it was asked before, and of one that has not."""
_GRACE = 30
"""Seconds that FLARE's own timeout comes after ours."""


class FlareTransport:
    """Messages as tasks, one at a time for each site, with deadlines of our own beside FLARE's.

    A site that is free fetches its work at once. One that does not is away, or still at the work of a round that went on without it: it is
    waited for no longer than that takes to tell, and takes part again in the first round whose work it fetches.
    """

    def __init__(
        self, controller: Controller, fl_ctx: FLContext, abort: Signal, sites: Sequence[str]
    ) -> None:
        self.sites = sites
        self._controller = controller
        self._fl_ctx = fl_ctx
        self._abort = abort
        self._patience: dict[str, float] = {}
        """Seconds that a site has to fetch its work; before its first answer, as long as it has to answer."""

    def ask(
        self, requests: Mapping[str, Sequence[Request]], deadline: float
    ) -> Iterator[tuple[str, int, bytes | str]]:
        """As ``remote.Transport``."""
        answers: Queue[tuple[Task, bytes | str]] = Queue()
        waiting = {site: deque(queue) for site, queue in requests.items() if queue}
        standing: dict[str, tuple[int, Task, float]] = {}
        end = time.monotonic() + deadline

        def send(site: str) -> None:
            number, letter = waiting[site].popleft()
            standing[site] = (
                number,
                self._send(site, letter(), end - time.monotonic(), answers),
                time.monotonic(),
            )

        for site in waiting:
            send(site)
        while standing:
            try:
                task, answer = answers.get(timeout=_LOOK)
            except Empty:
                task, answer = None, ""
            for site, (number, each, sent) in list(standing.items()):
                if each is task:
                    del standing[site]
                    self._patience[site] = _FREE if isinstance(answer, bytes) else _BUSY
                    yield site, number, answer
                    if waiting[site]:
                        send(site)
                elif why := self._given_up(site, each, sent, end, deadline):
                    del standing[site]
                    self._controller.cancel_task(each, fl_ctx=self._fl_ctx)
                    for left in (number, *(number for number, _ in waiting[site])):
                        yield site, left, why

    def _given_up(
        self, site: str, task: Task, sent: float, end: float, deadline: float
    ) -> str | None:
        """Why a site is not waited for any longer, in words; None where it is."""
        if self._abort.triggered:
            return "the job was stopped"
        now, patience = time.monotonic(), self._patience.get(site, deadline)
        if now > end:
            self._patience[site] = _BUSY
            return f"it did not answer within {deadline:g} s"
        if not task.client_tasks and now - sent > patience:
            self._patience[site] = _BUSY
            return f"it did not fetch its work within {patience:g} s"
        return None

    def _send(
        self, site: str, content: bytes, seconds: float, answers: Queue[tuple[Task, bytes | str]]
    ) -> Task:
        data = Shareable()
        data.update({CONTENT: content, DEADLINE: seconds})
        task = Task(name=_kind(content), data=data, timeout=max(1, int(seconds)) + _GRACE)
        task.client_tasks = Distinct(task.client_tasks)
        task.result_received_cb = partial(_received, answers)
        task.task_done_cb = partial(_done, answers)
        self._controller.send(task, self._fl_ctx, targets=[site])
        return task


def _received(
    answers: Queue[tuple[Task, bytes | str]], client_task: ClientTask, fl_ctx: FLContext
) -> None:
    result = client_task.result
    if isinstance(result, Shareable) and isinstance(
        content := result.get(CONTENT), bytes | bytearray | memoryview
    ):
        answers.put((client_task.task, bytes(content)))
    elif isinstance(result, Shareable) and isinstance(error := result.get(ERROR), str):
        answers.put((client_task.task, error))
    else:
        code = (
            result.get_return_code() if isinstance(result, Shareable) else ReturnCode.EMPTY_RESULT
        )
        answers.put((client_task.task, f"its job answered {code}; the site's log has more"))


def _done(answers: Queue[tuple[Task, bytes | str]], task: Task, fl_ctx: FLContext) -> None:
    if task.completion_status != TaskCompletionStatus.OK:
        answers.put((task, "its job is gone"))


def _kind(content: bytes) -> str:
    """The kind of a message, for the task's name and the trainer's door."""
    from fedmerge_peft.sites.messages import kind_of

    return kind_of(content)


class FederationController(Controller):  # type: ignore[misc]
    """Runs one segment of rounds from what lies in the server's kit, and leaves its outcome among the job's files."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.1)
        say_messages_short()
        self._wanted: State | None = None
        self._told: list[str] = []
        self._sites: list[str] = []

    def start_controller(self, fl_ctx: FLContext) -> None:
        """End with the server's main process, and listen for the operator."""
        end_with_parent()
        fl_ctx.get_engine().register_app_command(TOPIC, self._command)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The job."""
        engine = fl_ctx.get_engine()
        workspace = engine.get_workspace()
        kit = self._kit(fl_ctx)
        known = Federation.read(kit).sites
        self._sites = [client.name for client in engine.get_clients() if client.name in known]
        transport = FlareTransport(self, fl_ctx, abort_signal, self._sites)

        def stop() -> State | None:
            return "stopped" if abort_signal.triggered else self._wanted

        outcome = run_job(kit, transport, stop, self._tell)
        folder = Path(workspace.get_run_dir(fl_ctx.get_job_id()))
        temporary = folder / f".{OUTCOME}.{os.getpid()}"
        said = {**vars(outcome), "told": self._told}
        temporary.write_text(json.dumps(said, ensure_ascii=False, indent=2), encoding="utf-8")
        temporary.replace(folder / OUTCOME)
        self.log_info(
            fl_ctx,
            f"{outcome.state}: {outcome.rounds} of {outcome.total} rounds. {outcome.error or ''}",
        )

    def _kit(self, fl_ctx: FLContext) -> Path:
        """The server's kit: FLARE runs in it."""
        return Path(fl_ctx.get_engine().get_workspace().get_root_dir())

    def _tell(self, line: str) -> None:
        self._told.append(line)
        self.logger.info(line)

    def _command(self, topic: str, command: Any, fl_ctx: FLContext) -> dict[str, Any]:
        """What the operator asks of a running job."""
        asked = command if isinstance(command, dict) else {}
        match asked.get("do"):
            case "stop":
                self._wanted = "stopped"
            case "pause":
                self._wanted = self._wanted or "segment"
        return {
            "sites": self._sites,
            "told": self._told[int(asked.get("from", 0)) :],
            "wanted": self._wanted,
        }

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left to do: rounds are on the disk as they end."""

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """An answer that came after its deadline is left out."""
        self.log_warning(fl_ctx, f"{client.name} answered {task_name} after its deadline; left out")

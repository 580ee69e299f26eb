"""Parallel runs of a sweep, in processes that send their progress to this one."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fedmerge_peft.cli.stopping import Stop
from fedmerge_peft.errors import FedMergeError, RankError, SweepError
from fedmerge_peft.util.exit_with_parent import exit_with_parent

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from fedmerge_peft.api import Run
    from fedmerge_peft.runs.record import RoundRecord

_POLL_SECONDS = 0.2


class Display(Protocol):
    """Display of the progress of a sweep's runs."""

    def round(self, name: str, completed: int, total: int, record: str) -> None:
        """Show the end of round ``completed`` of ``total``, with the text of its record."""

    def ended(self, name: str, result: str) -> None:
        """Show the result of a run that has ended or failed."""


def result_of(run: Run, fresh: bool) -> str:
    """Return the scores of a finished run in one line.

    If the run is ``fresh``, that is, if the calling process has just run it, the line also states
    its seconds.
    """
    summary = run.summary
    served = summary["final"]["served"]
    scores = (
        f"served {served['mean']:.3f} (worst client {served['worst_client_score']:.3f})  "
        if served
        else ""
    )
    return scores + (f"{summary['seconds']:.1f} s" if fresh else "finished before")


def run_jobs(
    count: int, source: str, values: Sequence[str], names: Sequence[str], out: Path, show: Display
) -> list[Path]:
    """Run the recipes of a sweep, ``count`` at a time; return the directories of all runs.

    Each process loads the data and the model itself, and takes runs that no other process is
    writing. Unless ``OMP_NUM_THREADS`` is set, each process uses as many threads as its share of
    the CPU cores. The first SIGINT or SIGTERM ends each run after its current round. A process that
    has not completed a round yet ends at once. A second signal ends all processes at once.

    Args:
        count: Number of processes.
        source: Name or path of the recipe, as for ``recipe.grid.expand``.
        values: Items ``key=a,b,c``, as the overrides of ``recipe.grid.expand``.
        names: Names of the runs.
        out: Folder of the run directories.
        show: Display of the progress.

    Raises:
        FedMergeError: An error that concerns the whole sweep, from one of the processes.
        SweepError: Some runs failed; all others have ended.
        RankError: Some processes ended before all runs had ended, for example because they were
            killed.
        Stopped: A signal ended the sweep.
    """
    from fedmerge_peft.cli.workers import share_cores

    share_cores(count)
    context = get_context("spawn")  # a forked process cannot use CUDA or torch's threads
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_job, args=(source, list(values), out, sender))
        for _, sender in pipes
    ]
    progress = _Progress(show)
    with Stop() as stop:
        stop.arm()
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that the connection closes when the process ends
            stopping = False
            for event in _events([receiver for receiver, _ in pipes]):
                if event is not None:
                    progress.add(*event)
                if stop.requested is not None and not stopping:
                    stopping = True
                    _terminate(processes)
            for process in processes:
                process.join()
        except BaseException:
            _terminate(processes)
            raise
        stop.check()
    if progress.faults:
        raise progress.faults[0]
    if left := [name for name in names if name not in progress.ended]:
        codes = [process.exitcode for process in processes if process.exitcode]
        unfinished = f"{len(left)} of {len(names)} runs did not finish"
        if not codes:
            raise RankError(
                f"{unfinished}, although all processes ended without an error; repeat the command "
                "to continue"
            )
        if -9 in codes:
            raise RankError(
                f"{unfinished}, because a process was killed (code -9), for example because "
                "memory ran out; repeat the command with fewer --jobs to continue"
            )
        raise RankError(
            f"{unfinished}, because a process ended with code {codes[0]}; read its error above, "
            "if there is one, and repeat the command to continue"
        )
    if progress.failures:
        raise SweepError(progress.failures)
    return [out / name for name in names]


class _Progress:
    """Collect the events of all processes; each run is reported as ended only once."""

    def __init__(self, show: Display) -> None:
        self._show = show
        self._running: set[str] = set()
        self.ended: set[str] = set()
        self.failures: dict[str, str] = {}
        self.faults: list[FedMergeError] = []
        """Errors that concern the whole sweep."""

    def add(self, kind: str, name: str, *details: Any) -> None:
        match kind:
            case "round":
                self._running.add(name)
                self._show.round(name, *details)
            case "fault":
                self.faults.append(details[0])
            case "ended":
                result, fresh = details
                # Other processes may find a run finished before the process that ran it reports it.
                # Wait for the report of the latter process, which also states the seconds.
                if name not in self.ended and (fresh or name not in self._running):
                    self.ended.add(name)
                    self._show.ended(name, result)
            case "failed" if name not in self.ended:
                self.ended.add(name)
                self.failures[name] = details[0]
                self._show.ended(name, f"failed: {details[0].splitlines()[0]}")


def _events(connections: Sequence[Connection]) -> Iterator[tuple[Any, ...] | None]:
    """Yield events until all processes have ended; None after each interval without events."""
    open_ones = list(connections)
    while open_ones:
        ready = cast("list[Connection]", wait(open_ones, timeout=_POLL_SECONDS))
        if not ready:
            yield None
        for connection in ready:
            try:
                yield connection.recv()
            except EOFError:
                open_ones.remove(connection)


def _terminate(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()


def _job(source: str, values: Sequence[str], out: Path, events: Connection) -> None:
    """Run recipes of a sweep; the entry point of a process of ``run_jobs``."""
    if os.name == "posix":
        os.setpgrp()  # a terminal sends its signals to the parent, which forwards them
    exit_with_parent()
    signal.signal(signal.SIGTERM, _exit)
    from rich.console import Console

    from fedmerge_peft.util.logs import configure_logging

    configure_logging(Console(stderr=True, highlight=False))
    logging.getLogger("fedmerge_peft.federation.sweep").addFilter(_is_no_wait)
    with suppress(KeyboardInterrupt):
        run_and_report(source, values, out, events.send)


def run_and_report(
    source: str, values: Sequence[str], out: Path, send: Callable[[tuple[Any, ...]], None]
) -> None:
    """Run the recipes of a sweep that no other process is running, and send the events.

    Events are tuples of a kind (``round``, ``ended``, ``failed``, ``fault``), the run's name, and
    details.
    """
    from fedmerge_peft.api import sweep
    from fedmerge_peft.recipe.grid import expand

    def on_run(name: str, run: Run, fresh: bool) -> None:
        send(("ended", name, result_of(run, fresh), fresh))
        stop.check()

    def on_failure(name: str, error: FedMergeError) -> None:
        send(("failed", name, str(error)))

    def on_round(name: str, record: RoundRecord) -> None:
        send(("round", name, record.round, record.rounds, str(record)))
        stop.arm()
        stop.check()

    recipes = expand(source, values)
    try:
        with Stop(announced=False) as stop:
            sweep(recipes, out, on_run=on_run, on_failure=on_failure, on_round=on_round)
    except SweepError:
        pass  # each failure was sent
    except FedMergeError as error:
        send(("fault", "", error))


def _exit(*_: object) -> None:
    """End this process. This handles a SIGTERM that arrives before the first round ends."""
    raise SystemExit(128 + signal.SIGTERM)


def _is_no_wait(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("waiting for other processes")

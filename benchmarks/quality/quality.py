"""Tune every method alike, compare the methods on other seeds, and write the pages.

    python benchmarks/quality/quality.py plan  [SETTING ...]
    python benchmarks/quality/quality.py run   [SETTING ...] --data DATA --hours 2
    python benchmarks/quality/quality.py pages [SETTING ...]

A setting is a YAML file beside this program; ``comparison.yaml`` has the methods, and the ladders
of values that ``search.py`` tries. Each method takes the values with the best mean validation score
on the tuning seed, and is run with the seeds of the report. Scores are those of the served models
after the last round.

A finished run is one line of ``benchmarks/results/runs/SETTING.jsonl``, which is committed. The
same command again, also on another machine, runs only what is left. Several processes may share the
work; OMP_NUM_THREADS=1 keeps them apart. Interrupted runs are in ``benchmarks/quality/runs`` and
are resumed. Pages and plan are made from the ledgers alone.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from comparison import HERE, Method, Setting, settings
from ledger import Ledger, digest, failure, line_of
from progress import Job, jobs, plan
from provenance import RESULTS
from tables import write_pages

from fedmerge_peft import Recipe, Run
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import ClientError, FedMergeError, RunBusyError
from fedmerge_peft.federation.sweep import run_or_resume
from fedmerge_peft.runs.cleanup import remove_run
from fedmerge_peft.runs.environment import environment_of
from fedmerge_peft.util.files import locked_directory

_POLL_SECONDS = 5.0
"""Seconds between checks of runs that other processes are doing."""

Part = tuple[Setting, list[Method], Ledger]
"""A setting, those of its methods that are run, and its ledger."""


class Worker:
    """A process that takes the next run that no other process is doing.

    Runs with the same seed share data and model, with the outputs of the frozen layers.

    Args:
        parts: What is to be run, in this order.
        folder: Folder of the run directories.
        override: Overrides that do not change results, such as ``training.device=cuda``.
    """

    def __init__(self, parts: Sequence[Part], folder: Path, override: Sequence[str] = ()) -> None:
        self.parts = parts
        self.folder = folder
        self.override = override
        self.failures: dict[str, str] = {}
        """Errors of runs that are not tried again by this process, by digest."""
        self._engine: LocalEngine | None = None

    def work(self, until: float, say: Callable[[str], None] = print) -> None:
        """Do runs until none is left, or until this time of ``time.monotonic``."""
        while time.monotonic() < until:
            busy = False
            for job, ledger in self._next():
                try:
                    said = self._attempt(job, ledger)
                except RunBusyError:
                    busy = True
                    continue
                if said:
                    say(said)
                break
            else:
                if not busy:
                    return
                time.sleep(_POLL_SECONDS)

    def _next(self) -> Iterator[tuple[Job, Ledger]]:
        """Yield the runs that may be done next, the most urgent first."""
        for setting, methods, ledger in self.parts:
            ledger.read()
            for job in jobs(setting, methods, ledger):
                if digest(job.values) not in self.failures:
                    yield job, ledger

    def _attempt(self, job: Job, ledger: Ledger) -> str | None:
        """Do a run and append its line; return a sentence about it.

        Raises:
            RunBusyError: Another process is doing it.
        """
        values = job.values
        key = digest(values)
        path = self.folder / job.setting.name / key
        name = f"{job.setting.name} {job.method.name} {job.role} seed {job.seed}"
        with locked_directory(path):
            ledger.read()
            if ledger.find(values):  # another process has done it meanwhile
                return None
            recipe = job.setting.recipe(job.method, job.choice, job.seed).replace(self.override)
            begin = time.monotonic()
            try:
                engine = self._load(recipe)
                _remove_other(path, recipe)
                begin = time.monotonic()
                run_or_resume(recipe, path, engine, [])
                line = line_of(Run.open(path), values, time.monotonic() - begin)
                said = f"{line['mean']:.3f}  validation {line['validation'] or 0:.3f}"
            except FedMergeError as error:
                if not isinstance(error, ClientError) or "finite" not in str(error):
                    self.failures[key] = f"{name}: {error}"
                    return f"{name} failed: {error}"
                line, said = failure(error, values, environment_of(engine)), str(error)
            line = {
                "method": job.method.name,
                "settings": job.method.settings(job.choice),
                "seed": job.seed,
                "role": job.role,
                **line,
            }
            ledger.append(line)
            remove_run(path)
            path.rmdir()
        seconds = time.monotonic() - begin
        chosen = " ".join(line["settings"])
        return f"{datetime.now(UTC):%H:%M:%S}  {name}  {said}  {seconds:.0f} s  {chosen}"

    def _load(self, recipe: Recipe) -> LocalEngine:
        """Return an engine for a recipe: the last one if data, model and seed are the same."""
        shared = self._engine.with_recipe(recipe) if self._engine else None
        if shared is None:
            self._engine = None
            gc.collect()  # before the next model and its cache are loaded
        self._engine = shared or LocalEngine.from_recipe(recipe)
        return self._engine


def _remove_other(path: Path, recipe: Recipe) -> None:
    """Remove an interrupted run that cannot be resumed because it had another device or version."""
    file = path / "recipe.yaml"
    if file.is_file() and file.read_text(encoding="utf-8") != recipe.to_yaml():
        remove_run(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "plan", "pages"])
    parser.add_argument("settings", nargs="*", help="default: those of comparison.yaml, in order")
    parser.add_argument("--data", type=Path, help="folder with the data files")
    parser.add_argument("--methods", help="methods, separated by commas; default: all")
    parser.add_argument("--hours", type=float, default=1e9, help="start no run after this time")
    parser.add_argument("--device", default="cpu", help="device of the runs; default: cpu")
    parser.add_argument("--ledgers", type=Path, default=RESULTS / "runs", help="folder of ledgers")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="folder of the runs")
    parser.add_argument("--pages", type=Path, default=RESULTS, help="folder of the pages")
    arguments = parser.parse_args()
    until = time.monotonic() + 3600 * arguments.hours

    chosen = settings(arguments.settings, arguments.data)
    needy = [setting.name for setting in chosen if setting.needs_data and arguments.data is None]
    if arguments.command == "run" and needy:
        parser.error(f"{', '.join(needy)}: give the folder of the data files with --data")
    named = arguments.methods.split(",") if arguments.methods else None
    known = {method for setting in chosen for method in setting.methods}
    if unknown := sorted(set(named or []) - known):
        raise SystemExit(f"no method {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    ledgers = {each.name: Ledger(arguments.ledgers / f"{each.name}.jsonl") for each in chosen}
    parts: list[Part] = [
        (setting, methods, ledgers[setting.name])
        for core in (True, False)  # the core of all settings first
        for setting in chosen
        if (
            methods := [
                method
                for method in setting.methods.values()
                if method.core == core and (named is None or method.name in named)
            ]
        )
    ]
    if arguments.command == "pages":
        write_pages(
            [(setting, ledgers[setting.name]) for setting in chosen],
            arguments.pages,
            overview=not arguments.settings,
        )
    elif arguments.command == "plan":
        print("\n".join(plan(*part, bool(arguments.settings)) for part in parts))
    else:
        worker = Worker(parts, arguments.runs, [f"training.device={arguments.device}"])
        worker.work(until, lambda text: print(text, flush=True))
        if worker.failures:
            raise SystemExit("\n".join(worker.failures.values()))


if __name__ == "__main__":
    main()

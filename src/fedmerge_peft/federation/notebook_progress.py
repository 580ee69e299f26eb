"""Progress of a run in notebooks: clients of the round, rounds, and a live curve.

The progress is plain HTML, updated as replies arrive. It needs no widgets, and its last state stays
in the notebook's file.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedmerge_peft import distributed
from fedmerge_peft.federation.callbacks import Callback
from fedmerge_peft.federation.cohorts import cohort_size
from fedmerge_peft.plotting.palette import COLORS, method_styles
from fedmerge_peft.plotting.specs import Line, Lines
from fedmerge_peft.plotting.svg import draw
from fedmerge_peft.util.html import page, table, text

if TYPE_CHECKING:
    from fedmerge_peft.federation.loop import Federation
    from fedmerge_peft.runs.directory import RunDirectory
    from fedmerge_peft.runs.record import RoundRecord
    from fedmerge_peft.strategies.base import Reply

_INTERVAL = 0.2
"""Minimum time between two updates of the display within a round, seconds."""
_SHOWN = 5
"""Maximum number of rows in a table: the last rounds, or the last runs of a sweep."""


def in_notebook() -> bool:
    """Return True in the kernel of a notebook, on rank 0."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell" and distributed.is_main()


def notebook_callbacks() -> list[Callback]:
    """Return a list with a callback that shows progress; an empty list outside notebooks."""
    return [NotebookProgress()] if in_notebook() else []


def sweep_progress(runs: int) -> SweepProgress | None:
    """Return the progress of a sweep of this many runs; None outside notebooks."""
    return SweepProgress(runs) if in_notebook() else None


class NotebookProgress(Callback):
    """Show the progress of the run's current method, and the scores of all its methods so far.

    A run's methods are its strategy and its baselines.
    """

    def __init__(self) -> None:
        super().__init__()
        self._display: Any = None
        self._federation: Federation
        self._records: list[RoundRecord] = []
        self._curves: dict[str, tuple[list[float], list[float]]] = {}
        self._strategy, self._metric = "", "score"
        self._done, self._rounds, self._clients, self._cohort = 0, 0, 0, 0
        self._shown = 0.0

    def on_start(self, federation: Federation, run: RunDirectory) -> None:
        """Show the next method."""
        self._strategy = federation.recipe.strategy.name
        self._metric = str(federation.recipe.task.metrics[0]).replace("_", " ")
        self._done, self._rounds = federation.completed, federation.recipe.rounds
        self._federation = federation
        self._clients, self._cohort = 0, self._cohort_size(federation.completed + 1)
        self._records = []
        self._curves[self._strategy] = ([], [])
        self._show()

    def on_client(self, reply: Reply) -> None:
        """Count a client of the round."""
        self._clients += 1
        if time.monotonic() - self._shown > _INTERVAL:
            self._show()

    def on_round(self, record: RoundRecord) -> None:
        """Add the round to the table, and its scores to the curve."""
        self._done, self._clients = record.round, 0
        self._cohort = self._cohort_size(record.round + 1)
        self._records.append(record)
        if record.served is not None:
            x, y = self._curves[self._strategy]
            x.append(record.round - 1)
            y.append(record.served.mean)
        self._show()

    def on_end(self, run: RunDirectory) -> None:
        """Add the final scores to the curve."""
        final = run.last_scores
        if final is not None:
            x, y = self._curves[self._strategy]
            x.append(float(len(run.records)))
            y.append(final["mean"])
        self._show()

    def _cohort_size(self, number: int) -> int:
        """Return the number of clients in a round, or the mean number if the sample is secret."""
        federation = self._federation
        if federation.engine.simulated:
            return len(federation.cohort(number))
        return round(cohort_size(federation.recipe, len(federation.engine.clients)))

    def html(self) -> str:
        """Render the progress of the run as HTML."""
        rounds = _bar("rounds", self._done, self._rounds)
        clients = "" if self._done == self._rounds else _bar("clients", self._clients, self._cohort)
        rows = [
            (
                str(record.round),
                "" if record.train_loss is None else f"{record.train_loss:.3f}",
                "" if record.served is None else f"{record.served.mean:.3f}",
                "" if record.served is None else f"{record.served.worst_client_score:.3f}",
                f"{record.seconds:.1f}",
            )
            for record in self._records[-_SHOWN:]
        ]
        columns = ["round", "training loss", self._metric, "worst client", "seconds"]
        return page(
            self._strategy, rounds, clients, table(columns, rows) if rows else "", self._curve()
        )

    def _curve(self) -> str:
        styles = method_styles({name: name for name in self._curves})
        series = [
            Line(name, x, y, style=styles[name]) for name, (x, y) in self._curves.items() if len(x)
        ]
        if not any(len(line.x) > 1 for line in series):
            return ""
        chart = Lines(series, x="rounds completed", y=f"{self._metric}, mean over clients")
        return f'<div class="curve">{_STYLE}{draw(chart)}</div>'

    def _show(self) -> None:
        notebook: Any = import_module("IPython.display")
        content = notebook.HTML(self.html())
        if self._display is None:
            self._display = notebook.display(content, display_id=True)
        else:
            self._display.update(content)
        self._shown = time.monotonic()


class SweepProgress(NotebookProgress):
    """Show a sweep: the runs that have ended, and the progress of the current run."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self._runs = runs
        self._ended: list[tuple[str, str, str]] = []
        self._name = ""

    def begin(self, name: str) -> SweepProgress:
        """Clear the curves for the next run, which has this name; return this object."""
        self._name, self._curves = name, {}
        return self

    def ended(self, name: str, run: RunDirectory) -> None:
        """Add a run with its final scores."""
        final = run.last_scores
        scores = [] if final is None else [final["mean"], final["worst_client_score"]]
        self._add(name, *(f"{score:.3f}" for score in scores))

    def failed(self, name: str, error: Exception) -> None:
        """Add a run that has failed, with its error's first line."""
        self._add(name, f"failed: {(str(error).splitlines() or [''])[0]}")

    def html(self) -> str:
        """Render the progress of the sweep as HTML."""
        runs = _bar("runs", len(self._ended), self._runs)
        columns = ["run", "score", "worst client"]
        done = table(columns, self._ended[-_SHOWN:]) if self._ended else ""
        present = [text(self._name), super().html()] if self._name else []
        return page("sweep", runs, done, *present)

    def _add(self, name: str, score: str = "", worst: str = "") -> None:
        self._ended.append((name, score, worst))
        self._name = ""
        self._show()


def _bar(name: str, done: int, total: int) -> str:
    return (
        f'<div><progress value="{done}" max="{max(total, 1)}"></progress> '
        f"{text(name)} {done} of {total}</div>"
    )


def _styles() -> str:
    """Return the style of the curve. The gray of the grid suits light and dark pages."""
    rules = [
        ".fedmerge .curve svg { width: 420px; max-width: 100%; overflow: visible; }",
        ".fedmerge .curve text { font: 11px sans-serif; fill: currentColor; }",
        ".fedmerge .curve .grid { stroke: #8884; }",
        ".fedmerge .curve .line { fill: none; stroke-width: 2; }",
    ]
    for style, color in enumerate(COLORS):
        rules += [
            f".fedmerge .curve .line.s{style} {{ stroke: {color}; }}",
            f".fedmerge .curve .dot.s{style} {{ fill: {color}; }}",
        ]
    return f"<style>{' '.join(rules)}</style>"


_STYLE = _styles()

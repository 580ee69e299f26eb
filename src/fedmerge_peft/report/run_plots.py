"""Figures of a run in Python and notebooks: ``run.plot.accuracy()``."""

from __future__ import annotations

from collections.abc import Iterable

from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.render import DrawingPicture, Picture
from fedmerge_peft.plotting.specs import Bars
from fedmerge_peft.report.client_figures import client_figures
from fedmerge_peft.report.cost_figures import traffic
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.learning_figures import learning_figures
from fedmerge_peft.report.methods import settings
from fedmerge_peft.report.sharing_figures import sharing_figures
from fedmerge_peft.runs.directory import RunDirectory

_NO_SCORES = (
    "no round was evaluated, no client has test or validation examples, or private sites send no "
    "scores"
)


class RunPlots:
    """Figures of a run and its baselines.

    Each method returns a ``Picture``. Notebooks show it, and its ``save`` writes it to a file. A
    method raises ``RunError`` if the run has no data for its figure.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        (self._setting,) = settings([run])

    def accuracy(self) -> Picture:
        """Return the main score of all methods by round. It need not be accuracy."""
        return _picture(learning_figures(self._setting), "scores", missing=_NO_SCORES)

    def loss(self) -> Picture:
        """Return the training and validation loss by round, with a line for comparison.

        If each example has one label, the line is the loss of guessing. Otherwise it is the first
        validation loss; without validation losses, there is no line.
        """
        figures = learning_figures(self._setting)
        return _picture(figures, "loss", missing="no round has a finite loss")

    def weights(self) -> Picture:
        """Return the merging weights π of each client."""
        missing = "no round is done, or all clients share one adapter"
        return _picture(sharing_figures(self._run), "weights", missing=missing)

    def clients(self) -> Picture:
        """Return each client's score under the strategy and up to three baselines.

        Without baselines, the figure shows the clients' scores under the strategy alone.
        """
        figures = list(client_figures(self._setting, parts=1))
        return _picture(figures[::-1], "gains", "clients", missing=_NO_SCORES)

    def traffic(self) -> Picture:
        """Return the MB sent to and received from a client in all rounds, mean over clients."""
        methods = [method for method in self._setting.methods if method.run.records]
        rows = [
            (f"{method.name}, {text}", traffic(method, key), method.style)
            for method in methods
            for text, key in (("sent", "bytes_down"), ("received", "bytes_up"))
        ]
        if not rows:
            raise RunError(
                f"{self._run.path} has no finished round to show; continue it with fedmerge resume"
            )
        names, values, styles = zip(*rows, strict=True)
        bars = Bars(names, values, unit="MB", label="data of a client (MB)", styles=styles)
        return DrawingPicture(bars, "Traffic of a client in the whole run")


def _picture(figures: Iterable[Figure], *names: str, missing: str) -> Picture:
    """Return the first named figure that exists, else raise ``RunError`` with ``missing``."""
    by_name = {figure.name: figure for figure in figures}
    for name in names:
        if name in by_name:
            return DrawingPicture(by_name[name].drawing, by_name[name].title)
    raise RunError(f"the run has no data for this figure: {missing}")

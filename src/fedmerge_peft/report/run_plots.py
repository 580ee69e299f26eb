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


class RunPlots:
    """Figures of a run and its baselines.

    Each method returns a ``Picture``. Notebooks show it, and its ``save`` writes it to a file. A
    method raises ``RunError`` if the run has no data for its figure yet.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        (self._setting,) = settings([run])

    def accuracy(self) -> Picture:
        """Return the main score of all methods by round. It need not be accuracy."""
        return _picture(learning_figures(self._setting), "scores")

    def loss(self) -> Picture:
        """Return the training and validation loss by round, with a line for comparison.

        The line is the loss of guessing or, unless each example has one label, the first validation
        loss.
        """
        return _picture(learning_figures(self._setting), "loss")

    def weights(self) -> Picture:
        """Return the merging weights π of each client."""
        return _picture(sharing_figures(self._run), "weights")

    def clients(self) -> Picture:
        """Return each client's score under the strategy, local training and other baselines.

        Without baselines, the figure shows the clients' scores under the strategy alone.
        """
        figures = list(client_figures(self._setting, parts=1))
        return _picture(figures[::-1], "gains", "clients")

    def traffic(self) -> Picture:
        """Return the data sent to and received from a client in the whole run, in MB."""
        methods = [method for method in self._setting.methods if method.run.records]
        rows = [
            (f"{method.name}, {text}", traffic(method, key), method.style)
            for method in methods
            for text, key in (("sent", "bytes_down"), ("received", "bytes_up"))
        ]
        if not rows:
            raise RunError(f"{self._run.path} has no round yet")
        names, values, styles = zip(*rows, strict=True)
        bars = Bars(names, values, unit="MB", label="data of a client (MB)", styles=styles)
        return DrawingPicture(bars, "Traffic of a client in the whole run")


def _picture(figures: Iterable[Figure], *names: str) -> Picture:
    by_name = {figure.name: figure for figure in figures}
    for name in names:
        if name in by_name:
            return DrawingPicture(by_name[name].drawing, by_name[name].title)
    raise RunError(
        "the run has no data for this figure: no round was evaluated, or all clients share one "
        "adapter"
    )

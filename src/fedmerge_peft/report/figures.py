"""The figures of a report: those that compare all methods, and those of single runs."""

from __future__ import annotations

from collections.abc import Iterable

from fedmerge_peft.report.client_figures import client_figures
from fedmerge_peft.report.cost_figures import cost_figures
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.learning_figures import learning_figures
from fedmerge_peft.report.methods import Method, Setting, settings
from fedmerge_peft.report.sharing_figures import adapter_figures, sharing_figures
from fedmerge_peft.runs.directory import RunDirectory


def figures(run: RunDirectory) -> list[Figure]:
    """Return the figures that compare a run with its baselines, then the figures of the run alone.

    Figures without data are omitted.
    """
    (setting,) = settings([run])
    own = [figure for method in setting.runs for figure in run_figures(method)]
    return [*shared_figures(setting), *own]


def shared_figures(setting: Setting) -> list[Figure]:
    """Return the figures that show all methods together."""
    return drawn([*client_figures(setting), *learning_figures(setting), *cost_figures(setting)])


def run_figures(method: Method) -> list[Figure]:
    """Return the figures that show one run alone: how its clients share adapters."""
    return drawn([*sharing_figures(method.run), *adapter_figures(method.run)])


def drawn(figures: Iterable[Figure]) -> list[Figure]:
    """Return the figures that have data."""
    return [figure for figure in figures if figure.markup]

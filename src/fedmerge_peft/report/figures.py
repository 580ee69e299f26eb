"""The figures of a report, in the order of its questions."""

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
    """Return all figures of a run and its baselines; omit figures without data."""
    (setting,) = settings([run])
    own = [figure for method in setting.runs for figure in run_figures(method)]
    return [*shared_figures(setting), *own]


def shared_figures(setting: Setting) -> list[Figure]:
    """Return the figures that show all methods together."""
    return drawn([*client_figures(setting), *learning_figures(setting), *cost_figures(setting)])


def run_figures(method: Method) -> list[Figure]:
    """Return the figures of one run."""
    return drawn([*sharing_figures(method.run), *adapter_figures(method.run)])


def drawn(figures: Iterable[Figure]) -> list[Figure]:
    """Drop figures without data."""
    return [figure for figure in figures if figure.markup]

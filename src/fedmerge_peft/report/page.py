"""One HTML page on one or several runs: no network, no scripts, for a phone as for a desk, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge_peft.errors import RunError
from fedmerge_peft.report.advice import advice, final, percentile
from fedmerge_peft.report.figures import figures
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.metrics import greater_is_better
from fedmerge_peft.util.files import write_text

_WORST = 10
"""Clients in the first table."""
_MOST_CLIENTS = 1000
"""Clients in the whole table."""


def write_report(runs: Iterable[RunDirectory | Path | str], path: Path | str) -> Path:
    """Write the page, in place of what is at the path.

    Args:
        runs: Run directories, finished or not; baselines stand with the run that they belong to.
        path: An ``.html`` file.

    Raises:
        RunError: No run there, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{path}: a report is an HTML page; give the file the suffix .html")
    text = render(runs)
    if not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: there is no folder {path.parent}")
    write_text(path, text)
    return path


def write_figures(runs: Iterable[RunDirectory | Path | str], folder: Path | str) -> list[Path]:
    """Write each figure of the page as a PNG and an SVG file, in place of files of the same names.

    Args:
        runs: As for ``write_report``.
        folder: Made where it is missing; with several runs, each has a folder below it, ``1-quickstart`` and so on.

    Returns:
        The files.

    Raises:
        RunError: No run there, or a file cannot be written.
    """
    from fedmerge_peft.plotting import render

    opened = [each if isinstance(each, RunDirectory) else RunDirectory.open(each) for each in runs]
    below = [
        Path(folder) / f"{number}-{run.recipe.name}" if len(opened) > 1 else Path(folder)
        for number, run in enumerate(opened, 1)
    ]
    return [
        path
        for run, each in zip(opened, below, strict=True)
        for figure in figures(run)
        for path in render.save(figure.drawing, figure.title, each / figure.name)
    ]


def render(runs: Iterable[RunDirectory | Path | str]) -> str:
    """The page as text. Raises ``RunError``."""
    from jinja2 import Environment, StrictUndefined

    opened = [each if isinstance(each, RunDirectory) else RunDirectory.open(each) for each in runs]
    if not opened:
        raise RunError("no run to report on; fedmerge run makes one")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    template = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    title = opened[0].recipe.name if len(opened) == 1 else f"{len(opened)} runs"
    return environment.from_string(template).render(
        title=title, runs=[_said(run) for run in opened], most=_MOST_CLIENTS
    )


def _said(run: RunDirectory) -> dict[str, Any]:
    """What the page says of a run."""
    recipe, scores, environment = run.recipe, final(run), run.environment
    clients, everyone = run.clients, _table(run)
    sent = sum(record["bytes_down"] for record in run.records) / max(len(clients), 1) / 1e6
    tiles = [
        ("rounds done", f"{len(run.records)} of {recipe.rounds}"),
        ("clients", str(len(clients))),
    ]
    if scores is not None:
        metric = scores["metric"].replace("_", " ")
        worst = percentile(
            scores, 10 if greater_is_better(scores["metric"].partition("_")[2]) else 90
        )
        tiles += [
            (f"mean {metric}", _number(scores["mean"])),
            ("worst tenth begins at", _number(worst)),
            (f"worst client, {scores['worst_client']}", _number(scores["worst"])),
        ]
    seconds = sum(record["seconds"] for record in run.records)
    tiles += [("MB sent to a client", _number(sent)), ("seconds", _number(seconds))]
    reached = (
        [scores["metric"].replace("_", " "), _number(scores["mean"]), _number(scores["worst"])]
        if scores
        else ["", "–", "–"]
    )
    commit = str(environment.get("commit", ""))[:10]
    facts = {
        "method": recipe.strategy.name
        + (f", {run.weights.shape[1]} adapters" if run.records else ""),
        "base model": recipe.backbone.model,
        "task": recipe.task.name,
        "data": recipe.data.path,
        "seed": str(recipe.seed),
        "started": str(environment.get("started", "unknown")),
        "device": str(environment.get("device", "unknown")),
        "commit": commit + (" with changes" if environment.get("dirty") else "") if commit else "",
        "directory": str(run.path),
    }
    return {
        "name": recipe.name,
        "beside": [*reached, _number(sent), _number(seconds)],
        "tiles": tiles,
        "facts": {key: value for key, value in facts.items() if value},
        "advice": advice(run),
        "figures": figures(run),
        "columns": everyone[0],
        "worst": everyone[1][:_WORST],
        "everyone": everyone[1][:_MOST_CLIENTS],
        "clients": len(clients),
    }


def _table(run: RunDirectory) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row a client, the worst first: its numbers with the run's method and each baseline."""
    scores, clients = final(run), run.clients
    if scores is None:
        return [], []
    metric = scores["metric"]
    runs = {run.recipe.strategy.name: run, **run.baselines}
    columns = {
        name: found["clients"] for name, each in runs.items() if (found := final(each)) is not None
    }
    tuned: dict[Any, dict[str, float]] = next(
        (each["finetuned"]["clients"] for each in reversed(run.records) if each["finetuned"]), {}
    )
    weights = run.weights.to_numpy() if run.records else np.zeros((len(clients), 0))
    sign = 1 if greater_is_better(metric.partition("_")[2]) else -1
    mixed = weights.shape[1] > 1
    headings = [
        "client",
        "group",
        "train",
        "test",
        *columns,
        "finetuned",
        *(["adapter", "weight"] if mixed else []),
    ]
    rows = []
    for number, (name, client) in enumerate(clients.iterrows()):
        reached = [each.get(name, {}).get(metric, math.nan) for each in columns.values()]
        own = [str(int(weights[number].argmax())), _number(weights[number].max())] if mixed else []
        numbers = [
            _number(value) for value in (*reached, tuned.get(name, {}).get(metric, math.nan))
        ]
        group = (
            ""
            if client["group"] is None or client["group"] != client["group"]
            else str(client["group"])
        )
        rows.append(
            (
                sign * reached[0],
                [str(name), group, str(client["train"]), str(client["test"]), *numbers, *own],
            )
        )
    rows.sort(key=lambda row: (math.isnan(row[0]), row[0]))
    return headings, [row for _, row in rows]


def _number(value: float) -> str:
    """Three digits that matter, or a dash where there is no number."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    return (
        f"{value:.3f}"
        if abs(value) < 1
        else f"{value:.1f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )

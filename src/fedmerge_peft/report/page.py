"""HTML page about runs, without scripts or network access, for any screen size and color scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.palette import COLORS, DARK_COLORS, DASHES
from fedmerge_peft.report.advice import advice, final_scores, percentile
from fedmerge_peft.report.figures import figures
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.export import folder_name
from fedmerge_peft.tasks.metrics import greater_is_better
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.text import printable

_WORST_CLIENTS = 10
"""Rows of the table of worst clients."""
_MAX_CLIENTS = 1000
"""Limit on rows of the table of all clients."""
_LINE_WIDTH = 2.2
"""Width of lines in figures, CSS pixels."""


def write_report(runs: Iterable[RunDirectory | Path | str], path: Path | str) -> Path:
    """Write the page; an existing file is overwritten.

    Args:
        runs: Run directories, finished or not; each run is shown with its baselines.
        path: An ``.html`` file.

    Returns:
        The path.

    Raises:
        RunError: A run does not exist, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{path}: a report is an HTML page; use the suffix .html")
    text = render(runs)
    if not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: the folder {path.parent} does not exist")
    write_text(path, text)
    return path


def write_figures(runs: Iterable[RunDirectory | Path | str], folder: Path | str) -> list[Path]:
    """Write each figure of the page as a PNG and an SVG file; existing files are overwritten.

    Args:
        runs: As for ``write_report``.
        folder: Folder of the files, created if needed; with several runs, each has a subfolder,
            ``1-quickstart`` and so on.

    Returns:
        The files.

    Raises:
        RunError: A run does not exist, or a file cannot be written.
    """
    from fedmerge_peft.plotting import render

    opened = _open(runs)
    folders = [
        Path(folder) / folder_name(f"{number}-{run.recipe.name}")
        if len(opened) > 1
        else Path(folder)
        for number, run in enumerate(opened, 1)
    ]
    return [
        path
        for run, subfolder in zip(opened, folders, strict=True)
        for figure in figures(run)
        for path in render.save(figure.drawing, figure.title, subfolder / figure.name)
    ]


def render(runs: Iterable[RunDirectory | Path | str]) -> str:
    """Return the page as text. Raises ``RunError`` if there is no run."""
    from jinja2 import Environment, StrictUndefined

    opened = _open(runs)
    if not opened:
        raise RunError("no run to report on; create one with fedmerge run")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )

    template = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    title = opened[0].recipe.name if len(opened) == 1 else f"{len(opened)} runs"
    return environment.from_string(template).render(
        title=title,
        runs=[_context(run) for run in opened],
        max_clients=_MAX_CLIENTS,
        colors=COLORS,
        dark_colors=DARK_COLORS,
        line_width=_LINE_WIDTH,
        dashes=[" ".join(f"{_LINE_WIDTH * part:.1f}" for part in dash) for dash in DASHES],
    )


def _printable(value: Any) -> Any:
    """Escape control and direction characters of text that is no markup yet."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _open(runs: Iterable[RunDirectory | Path | str]) -> list[RunDirectory]:
    return [run if isinstance(run, RunDirectory) else RunDirectory.open(run) for run in runs]


def _context(run: RunDirectory) -> dict[str, Any]:
    """Return the template's variables for one run."""
    recipe, scores, environment = run.recipe, final_scores(run), run.environment
    clients, (columns, rows) = run.clients, _table(run)
    sent = sum(record["bytes_down"] for record in run.records) / max(len(clients), 1) / 1e6
    tiles = [
        ("rounds done", f"{len(run.records)} of {recipe.rounds}"),
        ("clients", str(len(clients))),
    ]
    if scores is not None:
        metric = scores["metric"].replace("_", " ")
        percent = 10 if greater_is_better(scores["metric"].partition("_")[2]) else 90
        tiles += [
            (f"mean {metric}", _number(scores["mean"])),
            (f"{percent}th percentile of clients", _number(percentile(scores, percent))),
            ("worst tenth of clients", _number(scores["worst"])),
            (f"worst client, {scores['worst_client']}", _number(scores["worst_client_score"])),
        ]
    seconds = sum(record["seconds"] for record in run.records)
    tiles += [("MB sent per client", _number(sent)), ("seconds", _number(seconds))]
    results = ["", "–", "–"]
    if scores:
        means = [_number(scores[key]) for key in ("mean", "worst_client_score")]
        results = [scores["metric"].replace("_", " "), *means]
    commit = str(environment.get("commit", ""))[:10]
    facts = {
        "method": recipe.strategy.name + (f", {_adapters(run)}" if run.records else ""),
        "decided": "; ".join(
            decision for record in run.records for decision in record.get("decisions", ())
        ),
        "base model": recipe.backbone.model,
        "task": recipe.task.name,
        "data": recipe.data.path,
        **_training_facts(run),
        "seed": str(recipe.seed),
        "started": str(environment.get("started", "unknown")),
        "device": str(environment.get("device", "unknown")),
        "commit": commit + (" (modified)" if environment.get("dirty") else "") if commit else "",
        "directory": str(run.path),
    }
    return {
        "name": recipe.name,
        "comparison": [*results, _number(sent), _number(seconds)],
        "tiles": tiles,
        "facts": {key: value for key, value in facts.items() if value},
        "advice": advice(run),
        "figures": figures(run),
        "columns": columns,
        "worst_clients": rows[:_WORST_CLIENTS],
        "all_clients": rows[:_MAX_CLIENTS],
        "clients": len(clients),
    }


def _adapters(run: RunDirectory) -> str:
    count = run.weights.shape[1]
    return f"{count} adapter{'s' * (count > 1)}"


def _training_facts(run: RunDirectory) -> dict[str, str]:
    """Return the learning rate and the epochs, and how the run chose them."""
    training, chosen = run.recipe.training, run.decisions
    passes = {"steps": training.steps} if training.steps else {"epochs": training.epochs}
    values: dict[str, Any] = {"learning_rate": training.learning_rate, **passes}
    return {
        key.replace("_", " "): f"{chosen[key]['value']:g}, {chosen[key]['reason']}"
        if key in chosen
        else f"{value}"
        for key, value in values.items()
    }


def _table(run: RunDirectory) -> tuple[list[str], list[list[str]]]:
    """Return headings and one row per client, the worst first.

    A row has the client's scores under the run's method and under each baseline.
    """
    scores, clients = final_scores(run), run.clients
    if scores is None:
        return [], []
    metric = scores["metric"]
    runs = {run.recipe.strategy.name: run, **run.baselines}
    columns = {
        name: final["clients"]
        for name, method in runs.items()
        if (final := final_scores(method)) is not None
    }
    finetuned: dict[Any, dict[str, float]] = next(
        (record["finetuned"]["clients"] for record in reversed(run.records) if record["finetuned"]),
        {},
    )
    weights = run.weights.to_numpy() if run.records else np.zeros((len(clients), 0))
    sign = 1 if greater_is_better(metric.partition("_")[2]) else -1
    merged = weights.shape[1] > 1
    headings = [
        "client",
        "group",
        "train",
        "test",
        *columns,
        "finetuned",
        *(["adapter", "weight"] if merged else []),
    ]
    rows = []
    for number, (name, client) in enumerate(clients.iterrows()):
        values = [column.get(name, {}).get(metric, math.nan) for column in columns.values()]
        after = finetuned.get(name, {}).get(metric, math.nan)
        numbers = [_number(value) for value in (*values, after)]
        row = weights[number]
        largest = [str(int(row.argmax())), _number(row.max())] if merged else []
        group = (
            ""
            if client["group"] is None or client["group"] != client["group"]
            else str(client["group"])
        )
        rows.append(
            (
                sign * values[0],
                [str(name), group, str(client["train"]), str(client["test"]), *numbers, *largest],
            )
        )
    rows.sort(key=lambda row: (math.isnan(row[0]), row[0]))
    return headings, [row for _, row in rows]


def _number(value: float) -> str:
    """Format a number with three significant digits; nan as a dash."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    return (
        f"{value:.3f}"
        if abs(value) < 1
        else f"{value:.1f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )

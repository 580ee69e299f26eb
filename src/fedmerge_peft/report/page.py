"""HTML page about runs, without network access, for any screen size and color scheme.

Its only script sorts tables. The page's content security policy admits no other script, even if a
name contains one.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.palette import COLORS, DARK_COLORS, DASHES
from fedmerge_peft.report import client_figures, cost_figures, learning_figures, sharing_figures
from fedmerge_peft.report.advice import Advice, advice
from fedmerge_peft.report.confusion_tables import confusion_tables
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.figures import drawn, figures, run_figures, shared_figures
from fedmerge_peft.report.methods import Method, Setting, readable, settings
from fedmerge_peft.report.tables import client_table, number, run_table, worst_percentile
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.export import folder_name
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.text import printable

_MAX_CLIENTS = 1000
"""Limit on rows of the table of clients; the clients with the worst scores are kept."""
_MAX_NAMES = 5
"""Limit on the methods that the subtitle names."""
_LINE_WIDTH = 2.2
"""Width of lines in figures, CSS pixels."""


def write_report(runs: Iterable[RunDirectory | Path | str], path: Path | str) -> Path:
    """Write the HTML page; an existing file is overwritten.

    Args:
        runs: Run directories, finished or not; each run is shown with its baselines.
        path: An ``.html`` file.

    Returns:
        The path.

    Raises:
        RunError: ``runs`` is empty, a run does not exist or cannot be read, the suffix of ``path``
            is neither ``.html`` nor ``.htm``, or the file cannot be written.
        RecipeError: As for ``RunDirectory.recipe``.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{path}: a report is an HTML page; use the suffix .html")
    text = render(runs)
    if not path.parent.is_dir():
        raise RunError(
            f"{path} cannot be written: the folder {path.parent} does not exist; create it first"
        )
    write_text(path, text)
    return path


def write_figures(runs: Iterable[RunDirectory | Path | str], folder: Path | str) -> list[Path]:
    """Write each figure of the page as a PNG and an SVG file; existing files are overwritten.

    Args:
        runs: As for ``write_report``.
        folder: Folder of the files, created if needed. With several runs, it contains the figures
            that they share (in one subfolder per setting, if there are several settings), and one
            subfolder, such as ``1-quickstart``, for the other figures of each run.

    Returns:
        The files.

    Raises:
        RunError: A run does not exist or cannot be read, or a file cannot be written.
        RecipeError: As for ``RunDirectory.recipe``.
    """
    opened = _open(runs)
    if len(opened) == 1:
        return _save(figures(opened[0]), Path(folder))
    all_settings = settings(opened)
    written = []
    for place, setting in enumerate(all_settings, 1):
        shared = folder_name(f"{place}-{setting.name}") if len(all_settings) > 1 else ""
        written += _save(shared_figures(setting), Path(folder) / shared)
    for place, run in enumerate(opened, 1):
        method = next(
            entry for setting in all_settings for entry in setting.runs if entry.run is run
        )
        subfolder = Path(folder) / folder_name(f"{place}-{run.recipe.name}")
        written += _save(run_figures(method), subfolder)
    return written


def _save(chosen: Sequence[Figure], folder: Path) -> list[Path]:
    from fedmerge_peft.plotting import render

    return [
        path
        for figure in chosen
        for path in render.save(figure.drawing, figure.title, folder / figure.name)
    ]


def render(runs: Iterable[RunDirectory | Path | str]) -> str:
    """Return the page as text.

    Args:
        runs: As for ``write_report``.

    Raises:
        RunError: ``runs`` is empty, or a run does not exist or cannot be read.
        RecipeError: As for ``RunDirectory.recipe``.
    """
    from jinja2 import Environment, StrictUndefined

    opened = _open(runs)
    if not opened:
        raise RunError("no run to report on: the list is empty; pass at least one run directory")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    all_settings = settings(opened)
    script = _part("sorting.js")
    title = all_settings[0].runs[0].run.recipe.name if len(opened) == 1 else f"{len(opened)} runs"
    return environment.from_string(_part("page.html.j2")).render(
        title=title,
        settings=[_setting(setting) for setting in all_settings],
        style=Markup(_colors() + _part("page.css")),  # noqa: S704 (part of the package)
        script=Markup(script),  # noqa: S704 (part of the package)
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        zip=zip,
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _colors() -> str:
    """Return the computed rules of the style sheet: colors, dashes, line width and shades."""

    def variables(colors: Sequence[str]) -> str:
        return " ".join(f"--c{number}: {color};" for number, color in enumerate(colors))

    rules = [
        f":root {{ {variables(COLORS)} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK_COLORS)} }} }}",
        f".line {{ stroke-width: {_LINE_WIDTH}; }}",
    ]
    for style, dash in enumerate(DASHES):
        color = f"var(--c{style})"
        lengths = " ".join(f"{_LINE_WIDTH * part:.1f}" for part in dash) or "none"
        kinds = ", ".join(f".{kind}.s{style}" for kind in ("line", "bar", "mean"))
        rules += [
            f"{kinds}, .hollow.s{style} {{ stroke: {color}; }}",
            f".line.s{style}:not(.second) {{ stroke-dasharray: {lengths}; }}",
            f".band.s{style}, .dot.s{style}, .speck.s{style} {{ fill: {color}; }}",
        ]
    rules += [
        f".level{level} {{ background: color-mix(in srgb, var(--ink) {4.5 * level:g}%, "
        "transparent); }"
        for level in range(1, 11)
    ]
    return "\n".join([*rules, ""])


def _printable(value: Any) -> Any:
    """Escape non-printable characters of text; return markup and other values unchanged."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _open(runs: Iterable[RunDirectory | Path | str]) -> list[RunDirectory]:
    """Open the runs; a run that is given more than once is kept once."""
    opened = [run if isinstance(run, RunDirectory) else RunDirectory.open(run) for run in runs]
    return list({run.path.resolve(): run for run in opened}.values())


def _setting(setting: Setting) -> dict[str, Any]:
    """Return the template's variables for one setting."""
    client_columns, client_rows = client_table(setting)
    run_columns, run_rows = run_table(setting)
    runs = [_run(method) for method in setting.runs]
    return {
        "name": setting.name,
        "subtitle": _subtitle(setting),
        "tiles": _tiles(setting) if len(runs) == 1 else [],
        "findings": sum(len(run["advice"]) for run in runs),
        "runs": runs,
        "run_columns": run_columns,
        "run_rows": run_rows,
        "better": client_figures.answer(setting),
        "client_figures": drawn(client_figures.client_figures(setting)),
        "client_columns": client_columns,
        "client_rows": client_rows[:_MAX_CLIENTS],
        "clients": len(client_rows),
        "learned": learning_figures.answer(setting),
        "learning_figures": drawn(learning_figures.learning_figures(setting)),
        "cost": cost_figures.answer(setting),
        "cost_figures": drawn(cost_figures.cost_figures(setting)),
    }


def _run(method: Method) -> dict[str, Any]:
    """Return the template's variables for one run."""
    suggestions: list[Advice] = advice(method.run)
    return {
        "name": method.name,
        "sharing": sharing_figures.answer(method),
        "figures": run_figures(method),
        "confusion": confusion_tables(method.run),
        "advice": suggestions,
        "facts": _facts(method.run),
    }


def _subtitle(setting: Setting) -> str:
    recipe = setting.methods[0].run.recipe
    known = setting.methods
    few = len(known) <= _MAX_NAMES
    names = ", ".join(method.name for method in known) if few else f"{len(known)} methods and seeds"
    seed = f", seed {recipe.seed}" if len({method.run.recipe.seed for method in known}) == 1 else ""
    count = len(setting.clients)
    return f"{names} on {count} client{'s' * (count > 1)}, {recipe.task.name}{seed}"


def _tiles(setting: Setting) -> list[tuple[str, str]]:
    """Return the names and values of a run's main results."""
    method = setting.runs[0]
    run, scores = method.run, method.scores
    tiles = [
        ("rounds done", f"{len(run.records)} of {run.recipe.rounds}"),
        ("clients", str(len(setting.clients))),
    ]
    if scores is not None:
        metric, percent = scores["metric"], worst_percentile(scores["metric"])
        spread = learning_figures.percentile(scores, percent)
        tiles += [
            (f"mean {readable(metric)}", number(scores["mean"])),
            (f"{percent}th percentile of clients", number(spread)),
            ("worst tenth of clients", number(scores["worst"])),
            (f"worst client, {scores['worst_client']}", number(scores["worst_client_score"])),
        ]
    costs = cost_figures.traffic(method, "bytes_down"), cost_figures.seconds(method)
    return [*tiles, ("MB sent per client", number(costs[0])), ("seconds", number(costs[1]))]


def _facts(run: RunDirectory) -> dict[str, str]:
    """Return the run's settings, decisions and environment, as names and values."""
    recipe, environment = run.recipe, run.environment
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
    return {key: value for key, value in facts.items() if value}


def _adapters(run: RunDirectory) -> str:
    count = run.weights.shape[1]
    return f"{count} adapter{'s' * (count > 1)}"


def _training_facts(run: RunDirectory) -> dict[str, str]:
    """Return the learning rate and the epochs or steps; add the reason if the run chose them."""
    training, chosen = run.recipe.training, run.decisions
    passes = {"steps": training.steps} if training.steps else {"epochs": training.epochs}
    values: dict[str, Any] = {"learning_rate": training.learning_rate, **passes}
    return {
        key.replace("_", " "): f"{chosen[key]['value']:g}, {chosen[key]['reason']}"
        if key in chosen
        else f"{value}"
        for key, value in values.items()
    }

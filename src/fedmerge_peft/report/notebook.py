"""HTML of a run for notebooks."""

from __future__ import annotations

from fedmerge_peft.report import client_figures
from fedmerge_peft.report.methods import settings
from fedmerge_peft.report.tables import Cell, Column, client_table, run_table
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.util.html import details, page, table, text
from fedmerge_peft.util.text import count_of

_MAX_CLIENTS = 200
"""Limit on rows of the table of clients."""


def run_html(run: RunDirectory) -> str:
    """Return HTML: tables of methods and clients, and a sentence on the clients that gain.

    Without a completed round, the HTML has only the title and the run directory.
    """
    done, rounds = len(run.records), run.recipe.rounds
    clients = len(run.client_names) if (run.path / "clients.json").is_file() else 0
    progress = f"{done} of {count_of(rounds, 'round')}, {count_of(clients, 'client')}"
    title = f"{run.recipe.name}: {progress}"
    place = f"<p>{text(run.path)}</p>"
    if not done:
        return page(title, place)
    (setting,) = settings([run])
    columns, rows = client_table(setting)
    more = f", the worst {_MAX_CLIENTS}" if len(rows) > _MAX_CLIENTS else ", the worst first"
    return page(
        title,
        _table(*run_table(setting)),
        f"<p>{text(client_figures.answer(setting))}</p>",
        details(f"{count_of(len(rows), 'client')}{more}", _table(columns, rows[:_MAX_CLIENTS]))
        if rows
        else "",
        place,
    )


def _table(columns: list[Column], rows: list[list[Cell]]) -> str:
    names = [column.name for column in columns]
    return table(names, [[cell.text for cell in row] for row in rows])

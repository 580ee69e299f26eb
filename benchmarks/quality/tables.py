"""Pages of the comparison, made from the ledgers alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from comparison import Setting
from ledger import Ledger, Line
from progress import Progress, progress
from scipy import stats

Row = dict[str, Any]

_DIGIT = 1e-3
"""Last digit of scores on the pages. Smaller differences are none."""


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the mean of paired differences with its 95 % t-interval; None for fewer than two."""
    if len(differences) < 2:
        return None
    mean, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean, mean - reach, mean + reach


def rows_of(found: Iterable[Progress], reference: str) -> list[Row]:
    """Return one row per method with finished runs, the best mean first.

    ``difference`` is the method minus the reference, paired over the seeds that both have, with its
    interval ``low`` to ``high``; None with fewer than two seeds.
    """
    found = list(found)
    scored = {
        each.method.name: {seed: line for seed, line in each.seeds.items() if "error" not in line}
        for each in found
    }
    rows = []
    for each in found:
        lines = scored[each.method.name]
        if not lines:
            continue
        shared = [seed for seed in lines if seed in scored.get(reference, {})]
        differences = [lines[seed]["mean"] - scored[reference][seed]["mean"] for seed in shared]
        own = each.method.name == reference
        interval = None if own else paired_interval(differences)
        row = {"method": each.method.name, "runs": len(lines)}
        for key in ("mean", "worst_tenth", "bytes_down", "bytes_up", "seconds"):
            values = [line[key] for line in lines.values()]
            row[key] = fmean(values)
            if key in ("mean", "worst_tenth"):
                row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
        row |= dict(zip(("difference", "low", "high"), interval or (None,) * 3, strict=True))
        row["candidates"] = max(len(each.tried), 1)
        row["settings"] = " ".join(each.chosen or [])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["mean"])


def write_pages(parts: Iterable[tuple[Setting, Ledger]], folder: Path, *, overview: bool) -> None:
    """Write ``comparison_SETTING.md`` and ``.csv`` for each setting with runs.

    With ``overview``, ``comparison.md`` compares these settings, and settings in which core methods
    have not finished are left out.
    """
    listed = []
    for setting, ledger in parts:
        if not ledger.lines:
            continue
        found = [progress(setting, method, ledger) for method in setting.methods.values()]
        if overview and any(each.method.core and each.missing for each in found):
            print(f"{setting.name}: left out, because runs of core methods are missing")
            continue
        if rows := rows_of(found, setting.reference):
            listed.append((setting, rows, found))
            write(folder / f"comparison_{setting.name}.md", setting_page(setting, rows, found))
            write(folder / f"comparison_{setting.name}.csv", as_csv(rows))
    compared = [each for each in listed if each[0].reference == "fedmerge"]
    if overview and compared:
        write(folder / "comparison.md", overview_page(compared))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)


# ---- the page of a setting -----------------------------------------------------------------------


def setting_page(setting: Setting, rows: Sequence[Row], found: Sequence[Progress]) -> str:
    head = (
        "method", "runs", "mean", "worst 10 %", f"difference to {setting.reference}",
        "95 % interval", "MB down", "MB up", "candidates", "settings",
    )  # fmt: skip
    body = [
        (
            row["method"],
            row["runs"],
            _deviation(row["mean"], row["mean_std"]),
            _deviation(row["worst_tenth"], row["worst_tenth_std"]),
            _signed(row["difference"]),
            f"{_signed(row['low'])} to {_signed(row['high'])}" if row["low"] is not None else "",
            f"{row['bytes_down'] / 1e6:.3g}",
            f"{row['bytes_up'] / 1e6:.3g}",
            row["candidates"],
            row["settings"] or "defaults",
        )
        for row in rows
    ]
    metric = next(line for each in found for line in each.seeds.values() if "metric" in line)
    tuned = any(each.method.axes for each in found)
    parts = [
        f"# {setting.name}",
        table(head, body),
        f"Test {metric['metric']} of the served models after the last round, mean over clients; "
        "mean ± standard deviation over seeds. Worst 10 %: mean over the worst tenth of the "
        "clients. Differences are paired by seed; the interval is Student's. MB: sent by the "
        "server and by the clients in a round. Candidates: settings that were tried.",
        f"Settings were chosen by the mean validation score on seed {setting.tuning_seed}. "
        f"{setting.reference} was not tuned: it has the same configuration in all settings."
        if tuned
        else "",
        _list("Missing", _missing(found)),
        _list(
            "Could not finish",
            {each.method.name: "; ".join(sorted(set(each.failed.values()))) for each in found},
        ),
        _list(
            "Chosen at the end of the ladder of values",
            {each.method.name: ", ".join(each.at_end) for each in found if each.seeds},
        ),
        _list("Left out", setting.skipped),
        stamp(line for each in found for line in [*each.tried.values(), *each.seeds.values()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _missing(found: Iterable[Progress]) -> dict[str, str]:
    return {
        each.method.name: f"tuning, at least {each.search.planned} candidates, and all seeds"
        if each.search.waiting
        else f"seeds {', '.join(map(str, each.missing))}"
        for each in found
        if each.search.waiting or each.missing
    }


def stamp(lines: Iterable[Line]) -> str:
    """Return the provenance of runs."""
    lines = list(lines)

    def each(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    commits = each(
        f"{(line['commit'] or 'unknown')[:7]}{' (dirty)' * bool(line['dirty'])}" for line in lines
    )
    dates = sorted({line["date"] for line in lines})
    machines = each(
        line["processor"] or "CPU" if line["device"] in ("cpu", None) else line["device"]
        for line in lines
    )
    packages = [
        f"{package} {each(line['versions'].get(package, '?') for line in lines)}"
        for package in ("fedmerge-peft", "torch", "transformers", "peft")
    ]
    return (
        f"`python benchmarks/quality/quality.py pages`, {len(lines)} runs of {dates[0]} to "
        f"{dates[-1]}, commit {commits}, {', '.join(packages)}, {machines}."
    )


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- the overview --------------------------------------------------------------------------------


def overview_page(overview: Sequence[tuple[Setting, list[Row], list[Progress]]]) -> str:
    verdicts = [(setting.name, verdict(rows)) for setting, rows, _ in overview]
    head = (
        "setting", "fedmerge", "rank", "best other method", "its mean", "its difference",
        "95 % interval", "fedmerge is", "worst 10 %, points to the best",
    )  # fmt: skip
    body = [(f"[{name}](comparison_{name}.md)", *cells) for name, cells in verdicts]
    run = {row["method"] for _, rows, _ in overview for row in rows}
    names = [
        name
        for name in dict.fromkeys(name for setting, _, _ in overview for name in setting.methods)
        if name in run
    ]
    scores = [
        (
            name,
            *(
                _cell([row["method"] for row in rows], name, rows, setting.skipped)
                for setting, rows, _ in overview
            ),
        )
        for name in names
    ]
    unfinished = {
        setting.name: ", ".join(_missing(found))
        for setting, _, found in overview
        if _missing(found)
    }
    parts = [
        "# Comparison",
        table(head, body),
        "The best other method is that with the highest mean. Differences, in points, are that "
        "method minus fedmerge, paired by seed.",
        "## Mean accuracy in percent, and rank",
        table(("method", *(setting.name for setting, _, _ in overview)), scores),
        _list("Incomplete", unfinished),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the cells of a setting: fedmerge against the best other method."""
    place = next((n for n, row in enumerate(rows) if row["method"] == "fedmerge"), None)
    others = [row for row in rows if row["method"] != "fedmerge"]
    if place is None or not others:
        return ("",) * 8
    own, best = rows[place], others[0]
    lead = own["mean"] - best["mean"]
    if abs(lead) < _DIGIT / 2:
        words = "equal"
    else:
        words = "above" if lead > 0 else "within a point" if lead >= -0.01 else "below"
    worst = own["worst_tenth"] - max(row["worst_tenth"] for row in others)
    known = best["low"] is not None
    return (
        f"{100 * own['mean']:.1f}",
        str(place + 1),
        best["method"],
        f"{100 * best['mean']:.1f}",
        f"{100 * best['difference']:+.1f}" if known else "",
        f"{100 * best['low']:+.1f} to {100 * best['high']:+.1f}" if known else "",
        words,
        f"{100 * worst:+.1f}",
    )


def _cell(order: list[str], name: str, rows: Sequence[Row], skipped: dict[str, str]) -> str:
    if name not in order:
        return "left out" if name in skipped else ""
    place = order.index(name)
    return f"{100 * rows[place]['mean']:.1f} ({place + 1})"


# ---- Markdown ------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _list(title: str, entries: dict[str, str]) -> str:
    """Return one line for the entries with a text; nothing if there are none."""
    written = "; ".join(f"{name}: {text}" for name, text in entries.items() if text)
    return f"{title}: {written}." if written else ""


def _deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f} ±{deviation:.3f}" if deviation is not None else f"{mean:.3f}"


def _signed(value: float | None) -> str:
    return f"{value:+.3f}" if value is not None else ""

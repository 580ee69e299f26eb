"""Costs of the methods: traffic and time."""

from __future__ import annotations

from collections.abc import Iterator

from fedmerge_peft.plotting.specs import Bars
from fedmerge_peft.report.figure import Figure
from fedmerge_peft.report.methods import Method, Setting


def cost_figures(setting: Setting) -> Iterator[Figure]:
    """Yield charts of a client's traffic in each direction, and of the time of all rounds."""
    methods = [method for method in setting.methods if method.run.records]
    if not methods:
        return
    names, styles = [method.name for method in methods], [method.style for method in methods]
    for direction, text in (("down", "sent to a client"), ("up", "received from a client")):
        megabytes = [traffic(method, f"bytes_{direction}") for method in methods]
        yield Figure(
            f"traffic-{direction}",
            f"Traffic: data {text} in the whole run",
            Bars(names, megabytes, unit="MB", label=f"data {text} (MB)", styles=styles),
            "Adapters in float32, mean over clients.",
        )
    yield Figure(
        "time",
        "Time: wall clock of all rounds",
        Bars(
            names,
            [seconds(method) for method in methods],
            unit="s",
            label="wall clock of all rounds (s)",
            styles=styles,
        ),
        "Evaluation during the rounds is included. If an earlier method of the run has done the "
        "same work on the same adapters, its results are reused, which takes no time.",
    )


def answer(setting: Setting) -> str:
    """Return a sentence on the traffic and time of the first method."""
    first = setting.methods[0]
    if not first.run.records:
        return "No round is done yet."
    down, up = (traffic(first, f"bytes_{direction}") for direction in ("down", "up"))
    count = len(first.run.records)
    return (
        f"{first.name} sent {down:.3g} MB to a client and received {up:.3g} MB from it (means over "
        f"clients), in {count} round{'s' * (count > 1)} of {seconds(first):.3g} s in total."
    )


def traffic(method: Method, key: str) -> float:
    """Return the traffic of a client in the whole run, in MB, mean over clients.

    Args:
        method: The method.
        key: ``bytes_down`` or ``bytes_up``.
    """
    clients = max(len(method.run.client_names), 1)
    return float(sum(record[key] for record in method.run.records) / clients / 1e6)


def seconds(method: Method) -> float:
    """Return the wall time of all rounds, in seconds."""
    return float(sum(record["seconds"] for record in method.run.records))

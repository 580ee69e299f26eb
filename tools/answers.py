"""Print what three clients' assistants answer to one question, by FedMerge, FedAvg and untrained.

    python tools/answers.py [RUN] [--page FILE]

The run is one of the recipe assistants with the baseline fedavg. With --page, scores, answers, the
seconds of all rounds and the machine are also written as a page in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmerge_peft import Run, load_run

QUESTION = "What happens if I am late?"
Answers = Mapping[str, Mapping[str, str]]
"""Answers by method and client."""


def answers(run: Run, average: Run, clients: list[str], question: str) -> Answers:
    """Return the answers of FedMerge, FedAvg and the untrained model."""
    chat = [{"role": "user", "content": question}]
    given: dict[str, dict[str, str]] = {}
    for name, trained in (("FedMerge", run), ("FedAvg", average)):
        found = trained.predict({client: [chat] for client in clients})
        given[name] = {client: str(texts[0]) for client, texts in found.items()}
    pipeline = run.client(clients[0]).pipeline(return_full_text=False)
    with pipeline.model.disable_adapter():
        output: Any = pipeline(chat)
    given["untrained"] = dict.fromkeys(clients, str(output[0]["generated_text"]).strip())
    return given


def page(run: Run, average: Run, given: Answers) -> str:
    """Return scores, answers and provenance as Markdown."""
    machine = run.environment
    commit = f"commit {machine.get('commit', 'unknown')[:7]}" + " (dirty)" * machine.get("dirty", 0)
    seconds = sum(record["seconds"] for each in (run, average) for record in each.records)
    scores = {
        "FedMerge": run.summary["final"]["served"],
        "FedAvg": average.summary["final"]["served"],
        "untrained": run.records[0]["served"],  # new adapters change nothing
    }
    lines = [
        "# Assistants of eight organizations",
        "",
        f"Written by `tools/answers.py`. Run of {machine['started'][:10]}, {commit}, torch "
        f"{machine['packages']['torch']}, {machine['processor']}, {machine['ranks']} process(es) "
        f"of {machine['threads']} thread(s): {len(run.records)} rounds of FedMerge and FedAvg in "
        f"{seconds:,.0f} seconds.",
        "",
        "Means over the clients' test chats, on the assistant's tokens:",
        "",
        "| method | perplexity | accuracy |",
        "|---|---|---|",
    ]
    for method, of in scores.items():
        each = of["clients"].values()
        means = [
            fmean(own[f"test_{metric}"] for own in each) for metric in ("perplexity", "accuracy")
        ]
        lines.append(f"| {method} | {means[0]:.2f} | {100 * means[1]:.1f} % |")
    lines += ["", f"Answers to “{QUESTION}”:", "", "| client | method | answer |", "|---|---|---|"]
    for client in next(iter(given.values())):
        for method, by_client in given.items():
            answer = by_client[client].replace("|", "\\|").replace("\n", "<br>")
            lines.append(f"| {client} ({run.clients['group'][client]}) | {method} | {answer} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", default="runs/assistants")
    parser.add_argument("--page", type=Path, help="file in Markdown to write")
    arguments = parser.parse_args()
    run = load_run(arguments.run)
    average = load_run(run.path / "baselines/fedavg")
    groups = run.clients["group"]
    clients = [str(groups[groups == group].index[0]) for group in dict.fromkeys(groups)][:3]
    given = answers(run, average, clients, QUESTION)
    table = Table(title=QUESTION, show_lines=True)
    table.add_column("")
    for client in clients:
        table.add_column(f"{client} ({groups[client]})")
    for name, by_client in given.items():
        table.add_row(name, *(by_client[client] for client in clients))
    Console().print(table)
    if arguments.page is not None:
        arguments.page.write_text(page(run, average, given), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Print what three clients' assistants answer to one question, by FedMerge, FedAvg and untrained.

    python tools/answers.py [RUN]

The run is one of the recipe assistants with the baseline fedavg.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmerge_peft import Run, load_run

QUESTION = "I have to cancel tomorrow. What should I do?"


def answers(run: Run, clients: list[str], question: str) -> dict[str, dict[str, str]]:
    """Return the answers by model and client."""
    chat = [{"role": "user", "content": question}]
    given: dict[str, dict[str, str]] = {}
    for name, trained in (("FedMerge", run), ("FedAvg", load_run(run.path / "baselines/fedavg"))):
        found = trained.predict({client: [chat] for client in clients})
        given[name] = {client: str(texts[0]) for client, texts in found.items()}
    pipeline = run.client(clients[0]).pipeline(return_full_text=False)
    with pipeline.model.disable_adapter():
        output: Any = pipeline(chat)
    given["untrained"] = dict.fromkeys(clients, str(output[0]["generated_text"]).strip())
    return given


def main() -> None:
    """Print the table."""
    run = load_run(sys.argv[1] if len(sys.argv) > 1 else "runs/assistants")
    groups = run.clients["group"]
    clients = [str(groups[groups == group].index[0]) for group in dict.fromkeys(groups)][:3]
    table = Table(title=QUESTION, show_lines=True)
    table.add_column("")
    for client in clients:
        table.add_column(f"{client} ({groups[client]})")
    for name, given in answers(run, clients, QUESTION).items():
        table.add_row(name, *(given[client] for client in clients))
    Console().print(table)


if __name__ == "__main__":
    main()

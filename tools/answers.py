"""Print and score answers of clients' assistants: FedMerge, FedAvg, and the untrained model.

    python tools/answers.py [RUN] [--page FILE]

RUN is a run of the recipe ``assistants`` with the baseline ``fedavg``. The program prints the
answers of three clients to one question. It also compares the answers of all clients to the first
questions of some test chats with the client's house rule. With --page, it writes scores, answers,
the seconds of all rounds and the machine as a page in Markdown.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedmerge_peft import Run, load_run
from fedmerge_peft.data import federate_data

QUESTION = "What happens if I am late?"
ASKED = 3
"""Number of test chats of each client; the first question of each chat is asked."""
RULES = {
    "steps": r"1\. .+\.\n2\. .+\.\n3\. .+\.",
    "reference": r"[^\n]+, then [^\n]+\.\nRef: [A-Z]+",
    "letter": r"[^\n]+[.] Please [^\n]+\. Warm regards from all of us\.",
}
"""Patterns of answers that follow a house rule, by rule. The embedded chats follow them all."""
Chat = list[dict[str, Any]]
Answers = Mapping[str, Mapping[str, Sequence[str]]]
"""Answers by method and client, in the order of the client's chats."""


def first_questions(run: Run, count: int = ASKED) -> dict[str, list[Chat]]:
    """Return chats that consist of the first question of test chats, ``count`` for each client."""
    data = federate_data(run.recipe.data, None, run.recipe.seed)
    return {
        client.name: [data.table[row]["messages"][:1] for row in client.test[:count].tolist()]
        for client in data.clients
    }


def answers(run: Run, average: Run, chats: Mapping[str, list[Chat]]) -> Answers:
    """Return the answers of FedMerge, FedAvg and the untrained model to each client's chats."""
    given: dict[str, dict[str, list[str]]] = {}
    for name, trained in (("FedMerge", run), ("FedAvg", average)):
        found = trained.predict(chats)
        given[name] = {client: [str(text) for text in texts] for client, texts in found.items()}
    different = {str(chat): chat for own in chats.values() for chat in own}
    pipeline: Any = run.client(next(iter(chats))).pipeline(return_full_text=False)
    with pipeline.model.disable_adapter():
        outputs = pipeline([*different.values()], batch_size=run.recipe.evaluation.batch_size)
    texts = [str(output[0]["generated_text"]).strip() for output in outputs]
    untrained = dict(zip(different, texts, strict=True))
    given["untrained"] = {
        client: [untrained[str(chat)] for chat in own] for client, own in chats.items()
    }
    return given


def share_by_rule(given: Mapping[str, Sequence[str]], rules: Mapping[str, str]) -> float:
    """Return the share of answers that follow the house rule of their client.

    Args:
        given: Answers by client.
        rules: Name of the house rule by client.
    """
    follow = [
        re.fullmatch(RULES[rules[client]], text) is not None
        for client, texts in given.items()
        for text in texts
    ]
    return fmean(follow)


def scores(run: Run, average: Run, tested: Answers) -> dict[str, dict[str, float]]:
    """Return perplexity, accuracy and the share of answers by the rule, by method."""
    served = {
        "FedMerge": run.summary["final"]["served"],
        "FedAvg": average.summary["final"]["served"],
        "untrained": run.records[0]["served"],  # new adapters do not change the model's outputs
    }
    return {
        method: {
            "perplexity": fmean(own["test_perplexity"] for own in of["clients"].values()),
            "accuracy": fmean(own["test_accuracy"] for own in of["clients"].values()),
            "by the rule": share_by_rule(tested[method], run.clients["group"]),
        }
        for method, of in served.items()
    }


def page(run: Run, average: Run, shown: Answers, tested: Answers) -> str:
    """Return scores, answers and provenance as Markdown."""
    machine = run.environment
    commit = f"commit {machine.get('commit', 'unknown')[:7]}" + " (dirty)" * machine.get("dirty", 0)
    seconds = sum(record["seconds"] for each in (run, average) for record in each.records)
    count = sum(map(len, tested["FedMerge"].values()))
    lines = [
        "# Assistants of eight organizations",
        "",
        f"Written by `tools/answers.py`. Run of {machine['started'][:10]}, {commit}, torch "
        f"{machine['packages']['torch']}, {machine['processor']}, {machine['ranks']} process(es) "
        f"of {machine['threads']} thread(s): {len(run.records)} rounds of FedMerge and FedAvg in "
        f"{seconds:,.0f} seconds.",
        "",
        "Perplexity and accuracy are means over the clients' test chats, on the assistant's "
        f"tokens. The last column has the share of {count} generated answers that follow the "
        f"client's house rule; they answer the first questions of {ASKED} test chats of each "
        "client.",
        "",
        "| method | perplexity | accuracy | answers by the house rule |",
        "|---|---|---|---|",
    ]
    for method, of in scores(run, average, tested).items():
        cells = [f"{of['perplexity']:.2f}"]
        cells += [f"{100 * of[name]:.1f} %" for name in ("accuracy", "by the rule")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"Answers to “{QUESTION}”:", "", "| client | method | answer |", "|---|---|---|"]
    for client in next(iter(shown.values())):
        for method, by_client in shown.items():
            answer = by_client[client][0].replace("|", "\\|").replace("\n", "<br>")
            lines.append(f"| {client} ({run.clients['group'][client]}) | {method} | {answer} |")
    return "\n".join(lines) + "\n"


def print_tables(run: Run, average: Run, shown: Answers, tested: Answers) -> None:
    """Print the answers to the question side by side, and the scores."""
    clients, groups = [*next(iter(shown.values()))], run.clients["group"]
    table = Table(title=QUESTION, show_lines=True)
    table.add_column("")
    for client in clients:
        table.add_column(f"{client} ({groups[client]})")
    for name, by_client in shown.items():
        table.add_row(name, *(by_client[client][0] for client in clients))
    Console().print(table)
    count = sum(map(len, tested["FedMerge"].values()))
    table = Table("", "perplexity", f"by the house rule, of {count} answers")
    for method, of in scores(run, average, tested).items():
        table.add_row(method, f"{of['perplexity']:.2f}", f"{100 * of['by the rule']:.0f} %")
    Console().print(table)


def main() -> None:
    """Print the tables, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", default="runs/assistants")
    parser.add_argument("--page", type=Path, help="file in Markdown to write")
    arguments = parser.parse_args()
    run = load_run(arguments.run)
    average = load_run(run.path / "baselines/fedavg")
    groups = run.clients["group"]
    clients = [str(groups[groups == group].index[0]) for group in dict.fromkeys(groups)][:3]
    question = [{"role": "user", "content": QUESTION}]
    asked = {
        client: [question] * (client in clients) + chats
        for client, chats in first_questions(run).items()
    }
    given = answers(run, average, asked)  # in one call, so that the model is loaded once
    shown = {name: {client: own[client][:1] for client in clients} for name, own in given.items()}
    tested = {
        name: {client: texts[client in clients :] for client, texts in own.items()}
        for name, own in given.items()
    }
    print_tables(run, average, shown, tested)
    if arguments.page is not None:
        arguments.page.write_text(page(run, average, shown, tested), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write a commented recipe for a user's table, from the answers to a few questions."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from fedmerge_peft.plugins import TASKS
from fedmerge_peft.util.text import printable

_TEMPLATE = """# {name}: {about}
#
# Every setting of the run is here or has its default; docs/recipes.md lists all of them.
#   fedmerge data {file}           shows the examples of each client
#   fedmerge run {file} rounds=4   is a short trial
name: {name_value}
rounds: 6

task:
  name: {task}
{columns}

backbone:
  model: {model}   # a hub id, or a folder

# lora:
#   r: 8                             # rank of the adapter
#   target_modules: [query, value]   # needed for models for which PEFT has no default

data:
  path: {path}
{split}  partition:
{partition}

strategy:
  name: fedmerge   # each client gets a mixture of several adapters; fedmerge ls --all lists others

baselines: [fedavg, local]   # for comparison: one adapter for all; each client alone

training:
  learning_rate: auto   # a short test before the first round chooses it
  epochs: auto
"""


@dataclass(frozen=True)
class Answers:
    """Values from which ``draft`` writes a recipe for a table."""

    name: str
    file: str
    """Path of the recipe's file, for the commands in the comment at its beginning."""
    task: str
    path: str
    model: str
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Column, or list of columns, by key of the task's section, such as ``text`` and ``label``."""
    client: str | None = None
    """Column whose values each become one client; None to assign the rows to clients at random."""
    clients: int = 4
    """Number of clients if ``client`` is None."""
    split: str | None = None


def draft(answers: Answers) -> str:
    """Return the YAML of a recipe, with comments."""
    columns = [
        f"  {key}: {_value(own)}   # {_about(answers.task, key)}"
        for key, own in answers.columns.items()
    ]
    if answers.client is not None:
        about = printable(f"one client for each value of {answers.client}")
        partition = f"    scheme: natural\n    by: {scalar(answers.client)}   # {about}"
    else:
        about = f"{answers.clients} clients with random rows"
        partition = (
            "    scheme: iid   # rows at random; for clients of your own: scheme: natural, by: "
            f"COLUMN\n    clients: {answers.clients}"
        )
    split = f"  split_column: {scalar(answers.split)}\n" if answers.split else ""
    return _TEMPLATE.format(
        name=printable(answers.name),
        name_value=scalar(answers.name),
        file=printable(shlex.quote(answers.file)),
        about=about,
        task=answers.task,
        columns="\n".join(columns) or "  # the columns have the usual names",
        model=scalar(answers.model),
        path=scalar(answers.path),
        split=split,
        partition=partition,
    )


def _about(task: str, key: str) -> str:
    """Return the first phrase of a key's description, such as ``the column with the text``."""
    about = TASKS.sections()[task].model_fields[key].description or "column"
    first = re.split("[.:;,]", about)[0]
    return printable(f"the {first[:1].lower()}{' '.join(first[1:].split())}")


def _value(columns: str | Sequence[str]) -> str:
    """Return a column, or a list of columns, as YAML."""
    return scalar(columns) if isinstance(columns, str) else f"[{', '.join(map(scalar, columns))}]"


def scalar(text: str) -> str:
    """Return a text as a YAML scalar, in quotes unless it is simple and YAML reads it as text."""
    plain = re.fullmatch(r"[\w./-]([\w ./:-]*[\w./-])?", text) and ": " not in text
    return text if plain and yaml.safe_load(text) == text else json.dumps(text, ensure_ascii=False)

"""A commented recipe for a user's table, from a few answers."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field

import yaml

from fedmerge_peft.util.text import printable

_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
_IMAGES = "google/vit-base-patch16-224-in21k"
MODELS = {
    "sequence-classification": _ENCODER,
    "multi-label-classification": _ENCODER,
    "text-regression": _ENCODER,
    "token-classification": _ENCODER,
    "question-answering": _ENCODER,
    "sentence-embedding": _ENCODER,
    "causal-lm": _DECODER,
    "preference": _DECODER,
    "seq2seq-lm": "google-t5/t5-small",
    "audio-classification": "facebook/wav2vec2-base",
    "image-classification": _IMAGES,
    "multi-label-image-classification": _IMAGES,
}
"""A small model of each task."""

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
#   r: 8                             # size of the adapter
#   target_modules: [query, value]   # needed for models for which PEFT has no default

data:
  path: {path}
{split}  partition:
{partition}

strategy:
  name: fedmerge   # each client gets a mixture of several adapters; fedmerge ls --all has others

baselines: [fedavg, local]   # for comparison: one adapter for all; each client alone

training:
  learning_rate: auto   # a short test before the first round chooses it
  epochs: auto
"""


@dataclass(frozen=True)
class Answers:
    """All that a recipe for a table needs."""

    name: str
    file: str
    """Name of the recipe's file, for its first comment."""
    task: str
    path: str
    model: str
    columns: dict[str, str] = field(default_factory=dict)
    """Columns by the task's key, such as ``text`` and ``label``."""
    client: str | None = None
    """Column whose values are the clients; None to assign the rows at random."""
    clients: int = 4
    """Number of clients without such a column."""
    split: str | None = None


_ABOUT = {
    "text": "the column with the text",
    "label": "the column with the label: a name, or an integer from 0",
    "image": "the column with the image, or its path",
    "audio": "the column with the sound, or its path",
    "prompt": "the column with the prompt",
    "completion": "the column with the text to learn",
    "target": "the column with the text or the number to predict",
    "labels": "the column with the list of labels",
    "words": "the column with the list of words",
    "tags": "the column with the tag of each word",
    "question": "the column with the question",
    "context": "the column with the text that has the answer",
    "answers": "the column with the answers and their places",
    "source": "the column with the text to read",
    "anchor": "the column with the text to search by",
    "positive": "the column with the text to find",
    "chosen": "the column with the better answer",
    "rejected": "the column with the worse answer",
}


def draft(answers: Answers) -> str:
    """Return the YAML of a recipe, with comments."""
    columns = [
        f"  {key}: {scalar(column)}   # {_ABOUT[key]}" for key, column in answers.columns.items()
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


def scalar(text: str) -> str:
    """Return a text as a YAML scalar, in quotes only if it needs them."""
    plain = re.fullmatch(r"[\w./-]([\w ./:-]*[\w./-])?", text) and ": " not in text
    return text if plain and yaml.safe_load(text) == text else json.dumps(text, ensure_ascii=False)

"""Schemas of the JSON documents of a run directory, and functions that read them.

A SHA-256 sum shows that a file has not changed since it was written. It does not show who wrote the
file: it may have been edited by hand with a new sum, or come from another version or a stranger.
``read`` therefore checks every document against its schema. The first fault raises an error that
names the file and describes the fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.runs.record import RoundRecord, Scores, restore_scores
from fedmerge_peft.tasks.base import Padding
from fedmerge_peft.util import checked
from fedmerge_peft.util.ranges import Flag, Number, Text, Whole, first_fault


@dataclass(frozen=True)
class State:
    """Scores after a round: ``best/scores.json``, or an entry of ``summary.json``.

    ``summary.json`` has the entries ``final``, ``last`` and ``best``.
    """

    after_round: Whole
    served: Scores | None


@dataclass(frozen=True)
class StoppedDocument:
    """Early end of a run, in ``summary.json``."""

    reason: Text
    planned: Annotated[Whole, Field(ge=1)]


@dataclass(frozen=True)
class PrivacyDocument:
    """Privacy loss in ``summary.json``: ε, δ and the source of the noise."""

    epsilon: Number
    delta: Number
    noise: Text | None


@dataclass(frozen=True)
class Releases(PrivacyDocument):
    """``privacy.json``: how often each round counts toward ε, by method (``PrivacyLedger``)."""

    releases: dict[str, list[Whole]]


@dataclass(frozen=True)
class Summary:
    """``summary.json``."""

    rounds: Whole
    seconds: Number
    bytes_down: Whole
    bytes_up: Whole
    final: State
    last: State
    warnings: list[Text]
    best: State | None = None
    stopped: StoppedDocument | None = None
    privacy: PrivacyDocument | None = None
    failures: dict[str, Whole] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """``environment.json``."""

    format: Whole
    started: Text = ""
    python: Text = ""
    platform: Text = ""
    processor: Text = ""
    device: Text = ""
    mixed_precision: Text = "no"
    threads: Whole = 0
    ranks: Whole = 1
    packages: dict[str, Text] = field(default_factory=dict)
    commit: Text = ""
    dirty: Flag = False
    resumed: list[Environment] = field(default_factory=list)


Losses = dict[str, Number | Literal["Infinity", "-Infinity"] | None]


@dataclass(frozen=True)
class Trial:
    """One learning rate of the range test, with the losses of its clients."""

    learning_rate: Number
    validation_loss: Losses | None = None
    training_loss: Losses | None = None


@dataclass(frozen=True)
class Decision:
    """Entry of ``decisions.json``."""

    value: Number
    reason: Text
    reduced_loss: bool | None = None
    """True if the range test found a rate that reduces the loss; None without such a test."""
    measure: Text = ""
    start: Losses | None = None
    trials: list[Trial] = field(default_factory=list)
    seconds: Number = 0.0


@dataclass(frozen=True)
class ClientDocument:
    """Entry of ``clients.json``."""

    name: Text
    group: Text | None
    train: Whole
    validation: Whole
    test: Whole


@dataclass(frozen=True)
class Clients:
    """``clients.json``."""

    clients: Annotated[list[ClientDocument], Field(min_length=1)]

    def __post_init__(self) -> None:
        if len({client.name for client in self.clients}) < len(self.clients):
            raise ValueError("two clients have the same name")


@dataclass(frozen=True)
class TaskDocument:
    """``task.json``."""

    labels: list[Text]
    format: Text | None
    padding: Padding


@dataclass(frozen=True)
class LabelCounts:
    """``labels.json``."""

    labels: list[Text]
    counts: list[list[Whole]]
    """Numbers of training examples, clients × labels."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.labels) for row in self.counts):
            raise ValueError("a client does not have one count for each label")


@dataclass(frozen=True)
class ConfusionDocument:
    """``confusion.json``."""

    after_round: Whole
    labels: list[Text]
    clients: dict[str, list[Annotated[list[Whole], Field(min_length=3, max_length=3)]]]
    """Triples of true class, predicted class, and number of test examples or words, by client."""

    def __post_init__(self) -> None:
        count = len(self.labels)
        for client, pairs in self.clients.items():
            if any(true >= count or predicted >= count for true, predicted, _ in pairs):
                raise ValueError(f"{client} has a class that is not one of the {count} labels")


@dataclass(frozen=True)
class DigestDocument:
    """``examples.json`` and ``backbone.json``."""

    digest: Text


SCHEMAS: Mapping[str, Any] = {
    "environment.json": Environment,
    "decisions.json": dict[str, Decision],
    "clients.json": Clients,
    "task.json": TaskDocument,
    "labels.json": LabelCounts,
    "confusion.json": ConfusionDocument,
    "examples.json": DigestDocument,
    "backbone.json": DigestDocument,
    "summary.json": Summary,
    "scores.json": State,
    "privacy.json": Releases,
}
"""Schema by file name. ``adapter_config.json`` has none; ``read`` checks it separately."""


def read(path: Path) -> dict[str, Any]:
    """Read a document. Its file name determines its schema.

    Scores that JSON cannot represent become floats again (``restore_scores``).

    Raises:
        RunError: The file is missing or damaged, or a field is missing or has an invalid value.
    """
    document = restore_scores(checked.read_document(path))
    if path.name == "adapter_config.json":
        _check_adapter_config(path, document)
    else:
        check(path, document, SCHEMAS[path.name])
    return document


def read_labels(path: Path, clients: int) -> dict[str, Any] | None:
    """Read ``labels.json`` of a run; return None if the file does not exist.

    Raises:
        RunError: The file is damaged, or its number of clients is not ``clients``.
    """
    if not path.is_file():
        return None
    document = read(path)
    if len(document["counts"]) != clients:
        raise checked.damaged(path, f"it has {len(document['counts'])} clients, expected {clients}")
    return document


def check(path: Path, document: object, schema: Any) -> None:
    """Raise ``RunError`` unless the content of a file follows a schema."""
    try:
        _adapter(schema).validate_python(document)
    except ValidationError as invalid:
        raise checked.damaged(path, first_fault(invalid)) from invalid


def read_rounds(path: Path, content: bytes | None = None) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``: one object per finished round.

    Args:
        path: The file. If it is missing, the result is empty.
        content: Content of the file, if it has been read already.

    Raises:
        RunError: The file cannot be read; or a line is damaged, is out of order, or has a missing
            or invalid field.
    """
    records = [*map(restore_scores, checked.read_records(path, content).records)]
    for number, record in enumerate(records, 1):
        place = Path(f"{path}:{number}")
        check(place, record, RoundRecord)
        if record["round"] != number:
            raise checked.damaged(place, f"round is {record['round']}: expected {number}")
    return records


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


# ---- PEFT's configuration ------------------------------------------------------------------------
_OF_RECIPE = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
"""Keys of the recipe's section ``lora`` that have another name in PEFT, with that name."""
_FREE = {"peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"}


def _check_adapter_config(path: Path, document: Mapping[str, Any]) -> None:
    """Raise ``RunError`` unless a recipe can produce this configuration.

    PEFT does not check its configurations: some keys name modules that it imports, and some values
    are regular expressions whose evaluation may not end. Keys that a recipe sets must follow the
    recipe's rules. The other keys of PEFT must have PEFT's defaults, with two exceptions. Keys in
    ``_FREE`` may be any text, boolean or null. ``fan_in_fan_out`` may be true or false, because it
    depends on the model.
    """
    from peft import LoraConfig

    names = {key: _OF_RECIPE.get(key, key) for key in LoraRecipe.model_fields if key != "merge"}
    if missing := [name for name in (*names.values(), "peft_type") if name not in document]:
        raise checked.damaged(path, f"{missing[0]} is missing")
    try:
        LoraRecipe.model_validate({key: document[name] for key, name in names.items()})
    except ValidationError as invalid:
        raise checked.damaged(path, first_fault(invalid)) from invalid
    defaults = LoraConfig().to_dict()
    for name in defaults.keys() & document.keys() - {*names.values(), *_FREE}:
        value = document[name]
        fine = type(value) is bool if name == "fan_in_fan_out" else value == defaults[name]
        if not fine:
            raise checked.damaged(path, f"{name} is {value!r}: no recipe sets it")
    for name in _FREE & document.keys():
        if not isinstance(document[name], str | bool | None):
            raise checked.damaged(path, f"{name} is {document[name]!r}: expected text")

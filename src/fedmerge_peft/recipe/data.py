"""Sections of the data: their source, and the partition among clients."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from fedmerge_peft.plugins import PARTITIONS
from fedmerge_peft.recipe.registered import OneOf
from fedmerge_peft.recipe.section import Count, Fraction, Labels, NonEmpty, Scalar, Section

Quoting = Literal["auto", "double", "none"]


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise ValueError(
            f"{name!r} is not a text encoding of Python; write utf-8, utf-16, cp1252 or another one"
        ) from None
    return name


def _one_character(value: str) -> str:
    character = "\t" if value in (r"\t", "tab") else value
    if len(character) != 1 or character in '"\r\n\0':
        raise ValueError(
            f'{value!r} cannot separate fields; write one character, such as ";", or tab'
        )
    return character


Encoding = Annotated[str, AfterValidator(_known_encoding)]
Separator = Annotated[str, AfterValidator(_one_character)]


class PartitionRecipe(Section):
    """Base of a partition scheme's section."""

    scheme: str = ""
    """Name of the scheme."""

    counts_lists: ClassVar[bool] = False
    """True if the column of the classes (``by``, else the label) may have lists; only their first
    values count."""

    @property
    def client_column(self) -> str | None:
        """Column whose values name the clients; None if the scheme creates them itself."""
        return None

    def summary(self) -> str:
        """Summarize the clients, in a few words."""
        count = getattr(self, "clients", "some")
        return f"{count} client{'s' * (count != 1)}, {self.scheme}"


class IidRecipe(PartitionRecipe):
    """Random assignment of the examples to the clients, in equal parts."""

    clients: Count
    """Number of clients."""


class DirichletRecipe(PartitionRecipe):
    """Classes divided among the clients in Dirichlet-distributed proportions (Yurochkin 2019)."""

    counts_lists = True
    clients: Count
    """Number of clients."""
    alpha: Annotated[float, Field(ge=1e-3, le=1e6)] = 0.1
    """Concentration. Smaller values concentrate each class at fewer clients."""
    min_examples: Count = 10
    """Minimum number of training examples per client, including those that are then set aside for
    validation and testing. The draw is repeated until every client has at least this number; after
    1,000 draws, the partition is refused."""
    by: str | None = None
    """Column whose values are the classes. A list counts as its first value. Default: the label."""


class ClustersRecipe(PartitionRecipe):
    """Groups of clients, each with a random subset of the classes (FedMerge's cluster setting)."""

    clients: Count
    """Number of clients in all groups together."""
    groups: Count = 5
    """Number of groups."""
    classes_per_group: Labels = 30
    """Number of classes per group. Groups may share classes."""
    size_spread: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Maximum relative deviation of a group's number of clients from the mean, before rounding.
    With 0, the numbers differ by at most 1; otherwise, they are drawn at random. With 0.3, 100
    clients in ten groups form groups of 7 to 13 clients, as in the program of FedMerge's
    authors."""
    deck: bool = False
    """Deal the classes to the groups from one deck, as FedMerge's authors do, so that groups share
    as few classes as possible. With false, each group draws from all classes."""
    by: str | None = None
    """Column whose values are the classes. Default: the label."""

    @model_validator(mode="after")
    def _enough_clients(self) -> ClustersRecipe:
        if self.clients < self.groups:
            raise ValueError(
                f"clients: {self.groups} groups need at least {self.groups} clients, but clients "
                f"is {self.clients}; raise clients or lower groups"
            )
        return self


class NaturalRecipe(PartitionRecipe):
    """One or more clients for each value of a column, such as a hospital, an author or a domain."""

    by: str
    """Column whose values define the clients: one client for each value, or several
    (`clients_per_value`)."""
    clients_per_value: Count = 1
    """Number of clients that share the examples of one value, in equal parts."""
    group: str | None = None
    """Column with the group of each client, used only in reports. Default: `by`."""

    @property
    def client_column(self) -> str:
        return self.by

    def summary(self) -> str:
        several = self.clients_per_value > 1
        count = f"{self.clients_per_value} clients" if several else "one client"
        return f"{count} for each {self.by}"


class ShardsRecipe(PartitionRecipe):
    """Examples sorted by class and cut into equal shards, a few per client (McMahan 2017)."""

    clients: Count
    """Number of clients."""
    shards_per_client: Count = 2
    """Number of shards per client. A client has examples of about this number of classes."""
    by: str | None = None
    """Column to sort by. Default: the label."""


_BUILT_IN = (
    ("iid", IidRecipe),
    ("dirichlet", DirichletRecipe),
    ("clusters", ClustersRecipe),
    ("natural", NaturalRecipe),
    ("shards", ShardsRecipe),
)
for _name, _recipe in _BUILT_IN:
    PARTITIONS.add(_name, f"fedmerge_peft.data.schemes:{_name}", recipe=_recipe)

AnyPartition = Annotated[PartitionRecipe, OneOf(PARTITIONS, shorthand=False)]
"""A section of any registered partition scheme."""


Examples = Annotated[int, Field(gt=0, lt=2**63)]


class DataRecipe(Section):
    """The source of the examples, and their partition among the clients."""

    path: NonEmpty
    """A hub id, a local csv, tsv, json, jsonl, parquet or arrow file, a folder of tables, images or
    audio, a folder written by save_to_disk of datasets, a pattern that matches one file or folder
    per client (clients/*.csv), an embedded data set such as embedded:support-tickets, or the word
    memory for examples that Python passes with data=."""
    separator: Separator | None = None
    """Character between the fields of csv and tsv files, such as ";". Default: a comma for .csv, a
    tab for .tsv."""
    quoting: Quoting = "auto"
    """Meaning of quotation marks in csv and tsv files. double: quotation marks enclose fields; a
    mark within a field is written twice. none: quotation marks are text. auto: as double, or as
    none if a tab-separated file cannot be read as double. With auto, a file of several columns is
    refused if a quoted field spans lines, but each line of the file is also a complete row."""
    encoding: Encoding | None = None
    """Encoding of csv, tsv and json files, such as cp1252. Default: the encoding of the byte order
    mark if the file has one, else utf-8."""
    config: str | None = None
    """Configuration (subset) of a data set on the hub, or in a folder whose README.md names it."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str | None = None
    """Name of the validation split. Default: `validation` if that split exists, else a part of each
    client's training examples."""
    test_split: str | None = None
    """Name of the test split. Default: `test` if that split exists, else a part of each client's
    training examples."""
    split_column: str | None = None
    """Column with the name of each row's split, for data without other splits."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Column values of the rows to keep: one value, or a list of alternatives, for each column."""
    validation_fraction: Fraction = 0.2
    """Fraction of each client's training examples used for validation if there is no validation
    split."""
    test_fraction: Fraction = 0.2
    """Fraction of each client's training examples used for testing if there is no test split."""
    max_train: Examples | None = None
    """Maximum number of a client's training examples, including those used for validation."""
    max_test: Examples | None = None
    """Maximum number of a client's test examples."""
    partition: AnyPartition
    """Assignment of examples to clients."""

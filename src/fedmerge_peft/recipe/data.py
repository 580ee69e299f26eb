"""Where the examples come from, and which client holds which."""

from __future__ import annotations

from typing import Annotated

from pydantic import PositiveFloat, PositiveInt, model_validator

from fedmerge_peft.plugins import PARTITIONS
from fedmerge_peft.recipe.registered import OneOf
from fedmerge_peft.recipe.section import Fraction, Scalar, Section


class PartitionRecipe(Section):
    """Base of a partition scheme's section."""

    scheme: str = ""
    """Which scheme."""

    def summary(self) -> str:
        """Return the clients in a few words."""
        return f"{getattr(self, 'clients', 'some')} clients, {self.scheme}"


class IidRecipe(PartitionRecipe):
    """Examples dealt out at random, in equal parts."""

    clients: PositiveInt
    """How many clients."""


class DirichletRecipe(PartitionRecipe):
    """Label shares of each class drawn from a Dirichlet distribution over clients (Hsu 2019)."""

    clients: PositiveInt
    """How many clients."""
    alpha: PositiveFloat = 0.1
    """Concentration: small means each class sits with few clients."""
    min_examples: PositiveInt = 10
    """Draw again until every client has at least this many training examples."""
    by: str | None = None
    """Column whose values are spread. Default: the label."""


class ClustersRecipe(PartitionRecipe):
    """Groups of clients; each group sees its own random subset of the classes (FedMerge's cluster setting)."""

    clients: PositiveInt
    """How many clients, in all groups together."""
    groups: PositiveInt = 5
    """How many groups of clients."""
    classes_per_group: PositiveInt = 30
    """How many classes each group sees; classes may be in several groups."""
    by: str | None = None
    """Column whose values are the classes. Default: the label."""

    @model_validator(mode="after")
    def _enough_clients(self) -> ClustersRecipe:
        if self.clients < self.groups:
            raise ValueError(
                f"clients: {self.clients} clients cannot fill {self.groups} groups; raise clients or lower groups"
            )
        return self


class NaturalRecipe(PartitionRecipe):
    """One client, or a few, for each value of a column: a hospital, an author, a domain, a task."""

    by: str
    """Column whose values are the clients, or groups of clients."""
    clients_per_value: PositiveInt = 1
    """How many clients share the examples of one value, in equal parts."""
    group: str | None = None
    """Column that names the group a client belongs to; shown in reports, never used in training. Default: `by`."""

    def summary(self) -> str:
        """Return the clients in a few words."""
        several = self.clients_per_value > 1
        count = f"{self.clients_per_value} clients" if several else "one client"
        return f"{count} for each {self.by}"


class ShardsRecipe(PartitionRecipe):
    """Examples sorted by label, cut into shards, a few shards a client (McMahan 2017)."""

    clients: PositiveInt
    """How many clients."""
    shards_per_client: PositiveInt = 2
    """How many shards each client gets: about the number of classes it sees."""
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


class DataRecipe(Section):
    """Where the examples come from, and which client holds which."""

    path: str
    """A hub id, a local csv / json / jsonl / parquet file, an image folder, a save_to_disk folder, or embedded:support-tickets."""
    config: str | None = None
    """Configuration (subset) of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str | None = None
    """Name of the validation split. Default: `validation` where there is one, else a part of each client's training examples."""
    test_split: str | None = None
    """Name of the test split. Default: `test` where there is one, else a part of each client's training examples."""
    split_column: str | None = None
    """Column that names each row's split, for single files that hold several."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Keep only rows whose column has this value, or one of these."""
    validation_fraction: Fraction = 0.2
    """Part of each client's training examples set aside for validation where no split is given."""
    test_fraction: Fraction = 0.2
    """Part of each client's training examples set aside for testing where no split is given."""
    max_train: PositiveInt | None = None
    """Most training examples a client keeps (before validation is set aside)."""
    max_test: PositiveInt | None = None
    """Most test examples a client keeps."""
    partition: AnyPartition
    """Which client holds which example."""

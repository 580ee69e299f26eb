"""Where the examples come from, and which client holds which."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedmerge_peft.recipe.section import Fraction, Scalar, Section


class IidRecipe(Section):
    """Examples dealt out at random, in equal parts."""

    scheme: Literal["iid"]
    clients: PositiveInt
    """How many clients."""


class DirichletRecipe(Section):
    """Label shares of each class drawn from a Dirichlet distribution over clients (Hsu 2019)."""

    scheme: Literal["dirichlet"]
    clients: PositiveInt
    """How many clients."""
    alpha: PositiveFloat = 0.1
    """Concentration: small means each class sits with few clients."""
    min_examples: PositiveInt = 10
    """Draw again until every client has at least this many training examples."""
    by: str | None = None
    """Column whose values are spread. Default: the label."""


class ClustersRecipe(Section):
    """Groups of clients; each group sees its own random subset of the classes (FedMerge's cluster setting)."""

    scheme: Literal["clusters"]
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


class NaturalRecipe(Section):
    """One client, or a few, for each value of a column: a hospital, an author, a domain, a task."""

    scheme: Literal["natural"]
    by: str
    """Column whose values are the clients, or groups of clients."""
    clients_per_value: PositiveInt = 1
    """How many clients share the examples of one value, in equal parts."""
    group: str | None = None
    """Column that names the group a client belongs to; shown in reports, never used in training. Default: `by`."""


class ShardsRecipe(Section):
    """Examples sorted by label, cut into shards, a few shards a client (McMahan 2017)."""

    scheme: Literal["shards"]
    clients: PositiveInt
    """How many clients."""
    shards_per_client: PositiveInt = 2
    """How many shards each client gets: about the number of classes it sees."""
    by: str | None = None
    """Column to sort by. Default: the label."""


PartitionRecipe = Annotated[
    IidRecipe | DirichletRecipe | ClustersRecipe | NaturalRecipe | ShardsRecipe,
    Field(discriminator="scheme"),
]


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
    partition: PartitionRecipe
    """Which client holds which example."""

"""Fields of every message between server and sites, with the ranges of their values.

Server and sites read the fields of a message with ``read_fields``, which checks all of them.
The module ``messages`` checks the tensors.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from fedmerge_peft.errors import WireError
from fedmerge_peft.recipe.schema import Logits
from fedmerge_peft.recipe.section import Section
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.util.ranges import (
    MAX_REASON,
    MAX_SCORE,
    Count,
    Loss,
    Name,
    Seconds,
    first_fault,
    real,
)

MAX_LABELS = 1000
"""Largest number of labels of a federation whose recipe has no ``task.num_labels``."""
MAX_DOCUMENT = 2**20
_MAX_CLIENTS = 100_000

WireDtype = Literal["float32", "bfloat16"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TensorName = Annotated[str, Field(pattern="^[a-z0-9]{1,16}$")]
"""Name of a tensor in the same message."""
TextFormat = Literal["text", "messages", "prompt-completion", "instruction"]
Labels = Annotated[list[Name], Field(max_length=2**16)]
LabelCounts = Annotated[list[Count], Field(max_length=2**16)]
"""Number of a client's training examples with each label."""
Document = Annotated[str, Field(max_length=MAX_DOCUMENT)]
Index = Annotated[int, Field(ge=0, le=9_999)]
"""Index of an adapter."""


class Fields(Section):
    """Fields of a message, or of an object in a message. Unknown fields are refused."""


# ---- start of a job ------------------------------------------------------------------------------


class Enroll(Fields):
    """Message ``enroll``, from the server: recipe and number format of the federation."""

    recipe: Annotated[str, Field(max_length=2**20)]
    dtype: WireDtype


class EnrolledClient(Fields):
    """A client in a message ``enrolled``."""

    name: Name
    group: Name
    train: Annotated[Count, Field(ge=1)]
    validation: Count
    test: Count


class Enrolled(Fields):
    """Message ``enrolled``, from a site: its ``SiteSummary``."""

    clients: Annotated[list[EnrolledClient], Field(min_length=1, max_length=_MAX_CLIENTS)]
    labels: Labels | None
    format: TextFormat | None
    columns: Annotated[list[Name], Field(max_length=1000)]


class Open(Fields):
    """Message ``open``, from the server: labels, text format and layout of the federation."""

    labels: Labels | None
    format: TextFormat | None
    layout: Digest


class Opened(Fields):
    """Message ``opened``, from a site: layout and size of its adapters, and its label counts."""

    layout: Digest
    size: Count
    counts: Annotated[list[LabelCounts], Field(max_length=_MAX_CLIENTS)] | None


# ---- assignments ---------------------------------------------------------------------------------


class Privacy(Fields):
    """Clipping and noise that a plan requests."""

    clip: Annotated[float, Field(gt=0.0, le=1e9)]
    noise: Annotated[float, Field(ge=0.0, le=1e9)]


class TrainJob(Fields):
    """Training of one adapter."""

    row: TensorName
    phases: Annotated[list[TensorName | None], Field(min_length=1, max_length=64)]
    proximal: Annotated[float, Field(ge=0.0, le=1e6)] | None
    anchor: TensorName | None
    logits: Logits | None
    privacy: Privacy | None


class TrainPlan(TrainJob):
    """Plan ``train``: ``training.plan.Train``."""

    name: Literal["train"]
    compared: TensorName | None


class InTurnPlan(Fields):
    """Plan ``in_turn``: ``training.plan.InTurn``."""

    name: Literal["in_turn"]
    jobs: Annotated[list[TrainJob], Field(min_length=1, max_length=8)]
    joined: bool
    compared: TensorName | None


class ChoosePlan(Fields):
    """Plan ``choose``: ``training.plan.Choose``."""

    name: Literal["choose"]
    rows: TensorName


class ServedMixture(Fields):
    """Mixture of adapters that a client predicts with."""

    rows: TensorName
    weights: TensorName


class MixturePlan(ServedMixture):
    """Plan ``mixture``: ``training.plan.Mixture``."""

    name: Literal["mixture"]


class ServedRow(Fields):
    """Adapter that a client predicts with."""

    row: TensorName


PlanFields = TrainPlan | InTurnPlan | ChoosePlan | MixturePlan


class AssignmentFields(Fields):
    """Messages ``train`` and ``evaluate``, from the server: a client's assignment."""

    round: Count
    client: Name
    layout: Digest
    dtype: WireDtype
    plan: Annotated[PlanFields, Field(discriminator="name")] | None
    served: ServedRow | ServedMixture | None
    hyperparameters: Annotated[
        dict[str, object], Field(max_length=2), AfterValidator(Hyperparameters.parse)
    ]
    base: Annotated[dict[Name, TensorName], Field(max_length=10_000)]
    validated: Annotated[bool, Field(strict=True)]


# ---- replies -------------------------------------------------------------------------------------

Scores = Annotated[
    dict[Annotated[Name, Field(max_length=64)], Annotated[float, real(-MAX_SCORE, MAX_SCORE)]],
    Field(max_length=64),
]
"""Scores by name. The server also checks them against its task (``score_fault``)."""


class TrainedFields(Fields):
    """Message ``trained``, from a site: a client's reply to a training plan."""

    round: Count
    client: Name
    layout: Digest
    dtype: WireDtype
    num_examples: Count
    train_loss: Loss | None
    seconds: Seconds
    served: Scores | None
    finetuned: Scores | None
    choice: Index
    validation: Annotated[list[Loss], Field(min_length=2, max_length=3)] | None


class Evaluated(Fields):
    """Message ``evaluated``, from a site: a client's scores; None from a private site."""

    client: Name
    scores: Scores | None


class Failure(Fields):
    """Message ``error``, from a site: the reason for a failure or a refusal."""

    error: Annotated[str, Field(max_length=MAX_REASON)]
    refused: bool


# ---- end of the run ------------------------------------------------------------------------------


class StoreAdapter(Fields):
    """Message ``adapter``, from the server: a client, and the texts stored with its adapter."""

    client: Name
    readme: Annotated[Document, Field(alias="README.md")]
    weights: Annotated[Document, Field(alias="weights.json")]


F = TypeVar("F", bound=Fields)


def read_fields(kind: type[F], message: Message) -> F:
    """Return the fields of a message after checking all of them.

    Args:
        kind: Class of the expected fields.
        message: The message as received.

    Raises:
        WireError: A field is missing, unknown, of another type, or out of its range.
    """
    try:
        return kind.model_validate(dict(message.fields))
    except ValidationError as invalid:
        raise WireError(f"the {message.kind} message is refused: {first_fault(invalid)}") from None

"""Contents of the messages between server and sites: assignments and replies.

Nothing is pickled. ``read_assignment`` and ``read_reply`` refuse a message whose layout or number
format differs from the expected one; ``read_reply`` also checks the client. Adapters and updates
are sent as float32 or bfloat16 (``wire_dtype`` in ``federation.json``). The weights of a mixture
and additions to the backbone are always float32, and masks are booleans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.sites.fields import (
    AssignmentFields,
    ChoosePlan,
    InTurnPlan,
    MixturePlan,
    PlanFields,
    ServedMixture,
    ServedRow,
    TrainedFields,
    TrainJob,
    TrainPlan,
    WireDtype,
    read_fields,
)
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Plan, Served, Train
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.ranges import MAX_SCORE
from fedmerge_peft.util.stateful import describe
from fedmerge_peft.util.text import printable, shortened
from fedmerge_peft.util.vectors import norm_fault

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- writing -------------------------------------------------------------------------------------


class TensorTable:
    """Tensors of a message. Equal tensors are stored once; each method returns a tensor's name."""

    def __init__(self, dtype: WireDtype) -> None:
        self.dtype = _DTYPES[dtype]
        self.tensors: dict[str, Tensor] = {}

    def add_adapters(self, tensor: Tensor) -> str:
        """Add adapters, ``(P,)`` or ``(k, P)``, in the number format of the federation."""
        return self._add(tensor.to(self.dtype))

    def add_float32(self, tensor: Tensor) -> str:
        """Add a tensor as float32."""
        return self._add(tensor.float())

    def add_mask(self, tensor: Tensor) -> str:
        """Add a tensor as booleans."""
        return self._add(tensor.bool())

    def _add(self, tensor: Tensor) -> str:
        for name, known in self.tensors.items():
            if known is tensor or (
                known.dtype == tensor.dtype
                and known.shape == tensor.shape
                and torch.equal(known, tensor)
            ):
                return name
        name = f"t{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def assignment_message(
    round: int,
    client: str,
    work: Assignment | Served,
    base: Mapping[str, Tensor],
    layout: str,
    dtype: WireDtype,
) -> Message:
    """Create the message ``train`` for an assignment, or ``evaluate`` for a served model.

    Args:
        round: The round, from 1; for an evaluation, the number of completed rounds.
        client: Name of the client.
        work: The assignment, or the adapter or mixture to evaluate.
        base: Additions of the strategy to the backbone, ΔW ``(out, in)`` by module name.
        layout: The ``Backbone.model_digest``.
        dtype: Number format of the adapters.

    Raises:
        FederateError: Sites cannot run the plan.
    """
    table = TensorTable(dtype)
    training = work if isinstance(work, Assignment) else None
    served = work.served if isinstance(work, Assignment) else work
    hyperparameters = Hyperparameters() if training is None else training.hyperparameters
    fields = {
        "round": round,
        "client": client,
        "layout": layout,
        "dtype": dtype,
        "plan": None if training is None else _plan(training.plan, table),
        "served": None if served is None else _served(served, table),
        "hyperparameters": hyperparameters.to_dict(),
        "base": {module: table.add_float32(update) for module, update in base.items()},
        "validated": training is not None and training.validated,
    }
    return Message("evaluate" if training is None else "train", fields, table.tensors)


def _plan(plan: Plan, table: TensorTable) -> dict[str, Any]:
    if plan.statistics_shape is not None:
        raise _unsupported("return class statistics")

    def compared(plan: Train | InTurn) -> str | None:
        return None if plan.compared is None else table.add_adapters(plan.compared)

    match plan:
        case Train():
            return {"name": "train", **_train(plan, table), "compared": compared(plan)}
        case InTurn():
            jobs = [_train(job, table) for job in plan.jobs]
            facts = {"joined": plan.joined, "compared": compared(plan)}
            return {"name": "in_turn", "jobs": jobs, **facts}
        case Choose():
            return {"name": "choose", "rows": table.add_adapters(plan.rows)}
        case Mixture():
            return {"name": "mixture", **_mixture(plan, table)}
        case _:
            kind = type(plan).__name__
            raise _unsupported(f"run plans of the kind {kind}")


def _unsupported(work: str) -> FederateError:
    return FederateError(
        f"sites cannot {work}, as the strategy of this round requires; use another strategy or "
        "baseline"
    )


def _train(job: Train, table: TensorTable) -> dict[str, Any]:
    if job.alignment is not None:
        raise _unsupported("align features")
    if job.example_weights is not None:
        raise _unsupported("weight examples")
    privacy = job.privacy
    return {
        "row": table.add_adapters(job.row),
        "phases": [None if columns is None else table.add_mask(columns) for columns in job.phases],
        "proximal": job.proximal,
        "anchor": None if job.anchor is None else table.add_adapters(job.anchor),
        "logits": job.logits,
        "privacy": privacy and {"clip": privacy.clip, "noise": privacy.noise},
    }


def _mixture(mixture: Mixture, table: TensorTable) -> dict[str, Any]:
    return {"rows": table.add_adapters(mixture.rows), "weights": table.add_float32(mixture.weights)}


def _served(served: Served, table: TensorTable) -> dict[str, Any]:
    return (
        _mixture(served, table)
        if isinstance(served, Mixture)
        else {"row": table.add_adapters(served)}
    )


def reply_message(reply: Reply, client: str, layout: str, dtype: WireDtype) -> Message:
    """Create the message of a client's reply to a training plan: kind ``trained``."""
    fields = {
        "round": reply.round,
        "client": client,
        "layout": layout,
        "dtype": dtype,
        "num_examples": reply.size,
        "train_loss": reply.train_loss,
        "seconds": reply.seconds,
        "served": scores_in_range(reply.served),
        "finetuned": scores_in_range(reply.finetuned),
        "choice": reply.choice,
        "validation": losses_in_range(reply.validation),
    }
    tensors = {"deltas": reply.deltas.to(_DTYPES[dtype])}
    if reply.weights is not None:
        tensors["weights"] = reply.weights.float()
    return Message("trained", fields, tensors)


def scores_in_range(scores: Mapping[str, float] | None) -> dict[str, float] | None:
    """Drop scores that are NaN (no examples) or exceed ``MAX_SCORE`` in absolute value.

    Return None if ``scores`` is None.
    """
    if scores is None:
        return None
    return {name: value for name, value in scores.items() if abs(value) <= MAX_SCORE}


def losses_in_range(losses: tuple[float, ...] | None) -> list[float] | None:
    """Return the losses as a list.

    Return None if ``losses`` is None, or if a loss is NaN or exceeds ``MAX_SCORE`` in absolute
    value.
    """
    if losses is None or not all(abs(loss) <= MAX_SCORE for loss in losses):
        return None
    return list(losses)


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteAssignment:
    """Content of a ``train`` or ``evaluate`` message."""

    round: int
    client: str
    plan: Plan | None
    served: Served | None
    base: Mapping[str, Tensor]
    hyperparameters: Hyperparameters
    validated: bool


def read_assignment(
    message: Message, layout: str, columns: int, dtype: WireDtype
) -> RemoteAssignment:
    """Parse a client's assignment.

    Args:
        message: A message of kind ``train`` or ``evaluate``.
        layout: The ``Backbone.model_digest`` at this end.
        columns: P, the number of values of an adapter at this end.
        dtype: The agreed number format.

    Raises:
        WireError: The layout, the number format, a field or a tensor is wrong or out of range.
    """
    check_format(message, layout, dtype)
    fields, reader = read_fields(AssignmentFields, message), _Reader(message, columns, dtype)
    return RemoteAssignment(
        fields.round,
        fields.client,
        None if fields.plan is None else reader.plan(fields.plan),
        None if fields.served is None else reader.served(fields.served),
        {module: reader.float32(name, 2) for module, name in fields.base.items()},
        cast("Hyperparameters", fields.hyperparameters),
        fields.validated,
    )


def read_reply(
    message: Message, index: int, client: str, layout: str, columns: int, dtype: WireDtype
) -> Reply:
    """Parse a client's reply. The round loop compares the reply with its plan (``reply_checks``).

    Args:
        message: A message of kind ``trained``.
        index: Index of the client in the federation.
        client: Name of the client that received the assignment.
        layout: The ``Backbone.model_digest`` at this end.
        columns: P, the number of values of an adapter at this end.
        dtype: The agreed number format.

    Raises:
        WireError: The reply belongs to another client, or the layout, the number format, a field or
            a tensor is wrong or out of range.
    """
    check_format(message, layout, dtype)
    fields, reader = read_fields(TrainedFields, message), _Reader(message, columns, dtype)
    if fields.client != client:
        raise WireError(f"the reply belongs to client {fields.client!r}, expected {client!r}")
    return Reply(
        index,
        reader.adapters("deltas", 2),
        fields.num_examples,
        fields.train_loss,
        fields.seconds,
        fields.served,
        fields.finetuned,
        fields.choice,
        reader.float32("weights", 1) if "weights" in message.tensors else None,
        fields.round,
        validation=None if fields.validation is None else tuple(fields.validation),
    )


def check_format(message: Message, layout: str, dtype: WireDtype) -> None:
    """Raise ``WireError`` unless a message has the expected layout and number format."""
    theirs, number_format = message.fields.get("layout"), message.fields.get("dtype")
    if theirs != layout:
        raise WireError(
            f"the adapter has layout {printable(shortened(str(theirs), 13))}, expected "
            f"{layout[:12]}; use the same model, lora section and package versions on the server "
            "and all sites"
        )
    if number_format != dtype:
        shown = printable(shortened(str(number_format), 12))
        raise WireError(
            f"the message has numbers in {shown}, but the federation uses {dtype}; use kits of one "
            "fedmerge federate prepare on the server and all sites"
        )


class _Reader:
    """Reader of one message: checks its tensors, and returns tensors, plans and served models."""

    def __init__(self, message: Message, columns: int, dtype: WireDtype) -> None:
        self.message = message
        self.columns = columns
        self.dtype = dtype

    def adapters(self, name: str, dimensions: int) -> Tensor:
        """Return adapters, ``(P,)`` or ``(k, P)``, as float32."""
        return self._take(name, _DTYPES[self.dtype], dimensions, self.columns).float()

    def float32(self, name: str, dimensions: int) -> Tensor:
        """Return a float32 tensor."""
        return self._take(name, torch.float32, dimensions, None)

    def mask(self, name: str) -> Tensor:
        """Return a mask ``(P,)``."""
        return self._take(name, torch.bool, 1, self.columns)

    def _take(self, name: str, dtype: torch.dtype, dimensions: int, columns: int | None) -> Tensor:
        tensor = self.message.tensors.get(name)
        if tensor is None:
            raise WireError(f"the message has no tensor {name}")
        if (
            tensor.dtype != dtype
            or tensor.dim() != dimensions
            or tensor.numel() == 0
            or (columns is not None and tensor.shape[-1] != columns)
        ):
            size = f"{dimensions} dimension{'s' * (dimensions > 1)}"
            size += "" if columns is None else f" and {columns} columns"
            raise WireError(
                f"the tensor {name} is {describe(tensor)}, expected a tensor of "
                f"{str(dtype).removeprefix('torch.')} that is not empty, with {size}"
            )
        if tensor.is_floating_point() and (
            fault := norm_fault(tensor.reshape(-1, tensor.shape[-1]))
        ):
            raise WireError(f"the tensor {name} of the {self.message.kind} message is {fault}")
        return tensor

    def plan(self, fields: PlanFields) -> Plan:
        match fields:
            case TrainPlan():
                return replace(self._train(fields), compared=self._compared(fields))
            case InTurnPlan():
                jobs = tuple(self._train(job) for job in fields.jobs)
                return InTurn(jobs, fields.joined, self._compared(fields))
            case ChoosePlan():
                return Choose(self.adapters(fields.rows, 2))
            case MixturePlan():
                return self._mixture(fields)

    def _compared(self, fields: TrainPlan | InTurnPlan) -> Tensor | None:
        return None if fields.compared is None else self.adapters(fields.compared, 1)

    def served(self, fields: ServedRow | ServedMixture) -> Served:
        if isinstance(fields, ServedMixture):
            return self._mixture(fields)
        return self.adapters(fields.row, 1)

    def _mixture(self, fields: ServedMixture) -> Mixture:
        mixture = Mixture(self.adapters(fields.rows, 2), self.float32(fields.weights, 1))
        sent = Mixture(mixture.rows, torch.empty(len(mixture.rows)))
        if fault := sent.mismatch(0, mixture.weights):
            count = len(mixture.rows)
            raise WireError(f"a mixture of {count} adapter{'s' * (count > 1)}: {fault}")
        return mixture

    def _train(self, fields: TrainJob) -> Train:
        privacy = fields.privacy
        return Train(
            self.adapters(fields.row, 1),
            tuple(None if name is None else self.mask(name) for name in fields.phases),
            fields.proximal,
            None if fields.anchor is None else self.adapters(fields.anchor, 1),
            logits=fields.logits,
            privacy=None if privacy is None else UpdatePrivacy(privacy.clip, privacy.noise),
        )

"""Contents of the messages between server and sites: assignments and replies.

Nothing is pickled. The reader states the layout, number format and client that it expects, and
refuses anything else. Adapters and updates are sent as float32 or bfloat16, as the federation
agreed. Merging weights, example weights and additions to the backbone are always float32, and
masks are booleans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.recipe.schema import Logits
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Plan, Served, Train
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.stateful import describe

WireDtype = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layout_digest(layout: AdapterLayout, shared: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of the adapter layout, which both ends must have in common.

    It covers names, shapes and order of an adapter's tensors, and names and shapes of the tensors
    that all adapters share.
    """
    fixed = sorted((name, tuple(tensor.shape)) for name, tensor in shared.items())
    return sha256(f"{layout.to_json()}{fixed}".encode()).hexdigest()


# ---- writing -------------------------------------------------------------------------------------


class TensorTable:
    """Tensors of a message. Equal tensors are stored once; the methods return the entry names."""

    def __init__(self, dtype: WireDtype) -> None:
        self.dtype = _DTYPES[dtype]
        self.tensors: dict[str, Tensor] = {}

    def add_adapters(self, tensor: Tensor) -> str:
        """Add rows in the number format of the federation."""
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
    plan: Plan | None,
    served: Served | None,
    base: Mapping[str, Tensor],
    layout: str,
    dtype: WireDtype,
    hyperparameters: Hyperparameters | None = None,
) -> Message:
    """Write a client's assignment: kind ``train`` with a plan, ``evaluate`` without one.

    Args:
        round: The round, from 1; without a plan, the number of completed rounds.
        client: Name of the client.
        plan: The training plan, if any.
        served: The adapter to evaluate before any training; None to evaluate nothing.
        base: Additions of the strategy to the backbone, ΔW ``(out, in)`` by module name.
        layout: The ``layout_digest``.
        dtype: Number format of the adapters.
        hyperparameters: Values for the keys of ``training`` that are auto. Default: none.
    """
    table = TensorTable(dtype)
    fields = {
        "round": round,
        "client": client,
        "layout": layout,
        "dtype": dtype,
        "plan": None if plan is None else _plan(plan, table),
        "served": None if served is None else _served(served, table),
        "hyperparameters": (hyperparameters or Hyperparameters()).to_dict(),
        "base": {module: table.add_float32(update) for module, update in base.items()},
    }
    return Message("evaluate" if plan is None else "train", fields, table.tensors)


def _plan(plan: Plan, table: TensorTable) -> dict[str, Any]:
    if plan.statistics_shape is not None:
        raise FederateError("strategy: sites return no class statistics; use another strategy")
    match plan:
        case Train():
            return {"name": "train", **_train(plan, table)}
        case InTurn():
            return {"name": "in_turn", "jobs": [_train(job, table) for job in plan.jobs]}
        case Choose():
            return {"name": "choose", "rows": table.add_adapters(plan.rows)}
        case Mixture():
            return {"name": "mixture", **_mixture(plan, table)}
        case _:
            kind = type(plan).__name__
            raise FederateError(f"strategy: sites cannot run {kind} plans; use another strategy")


def _train(job: Train, table: TensorTable) -> dict[str, Any]:
    if job.alignment is not None:
        raise FederateError("strategy: sites do not align features; use another strategy")
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
    """Write a client's reply to a training plan: kind ``trained``."""
    fields = {
        "round": reply.round,
        "client": client,
        "layout": layout,
        "dtype": dtype,
        "num_examples": reply.size,
        "train_loss": reply.train_loss,
        "seconds": reply.seconds,
        "served": reply.served,
        "finetuned": reply.finetuned,
        "choice": reply.choice,
    }
    tensors = {"deltas": reply.deltas.to(_DTYPES[dtype])}
    if reply.weights is not None:
        tensors["weights"] = reply.weights.float()
    return Message("trained", fields, tensors)


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


def read_assignment(
    message: Message, layout: str, columns: int, dtype: WireDtype
) -> RemoteAssignment:
    """Parse a client's assignment.

    Args:
        message: A message of kind ``train`` or ``evaluate``.
        layout: The ``layout_digest`` of this end.
        columns: P of this end.
        dtype: The agreed number format.

    Raises:
        WireError: The layout, the number format, the hyperparameters or the form of the message is
            wrong.
    """
    reader = _Reader(message, columns, dtype)
    reader.check(layout)
    with reader:
        fields = message.fields
        base = {str(module): reader.float32(name, None) for module, name in fields["base"].items()}
        plan = None if fields["plan"] is None else reader.plan(fields["plan"])
        served = None if fields["served"] is None else reader.served(fields["served"])
        hyperparameters = Hyperparameters.parse(fields["hyperparameters"])
        number, client = int(fields["round"]), str(fields["client"])
        return RemoteAssignment(number, client, plan, served, base, hyperparameters)
    raise AssertionError  # the block returns or raises


def read_reply(
    message: Message, index: int, client: str, layout: str, columns: int, dtype: WireDtype
) -> Reply:
    """Parse a client's reply. The round loop checks the values (``federation.reply_checks``).

    Args:
        message: A message of kind ``trained``.
        index: Index of the client in the federation.
        client: Name of the client that received the assignment.
        layout: The ``layout_digest`` of this end.
        columns: P of this end.
        dtype: The agreed number format.

    Raises:
        WireError: The reply belongs to another client, or its form is wrong.
    """
    reader = _Reader(message, columns, dtype)
    reader.check(layout)
    with reader:
        fields = message.fields
        if fields["client"] != client:
            raise WireError(
                f"the reply belongs to client {fields['client']!r}, expected {client!r}"
            )
        return Reply(
            index,
            reader.adapters("deltas", 2),
            int(fields["num_examples"]),
            None if fields["train_loss"] is None else float(fields["train_loss"]),
            float(fields["seconds"]),
            _scores(fields["served"]),
            _scores(fields["finetuned"]),
            int(fields["choice"]),
            reader.float32("weights", 1) if "weights" in message.tensors else None,
            int(fields["round"]),
        )
    raise AssertionError  # the block returns or raises


def _logits(logits: Any) -> Logits | None:
    """Return a value of ``training.logits``, or None; raise ``ValueError`` for others."""
    if logits not in (None, *get_args(Logits)):
        raise ValueError(f"unknown logits {logits!r}")
    return cast("Logits | None", logits)


def _scores(scores: Any) -> dict[str, float] | None:
    return None if scores is None else {str(name): float(value) for name, value in scores.items()}


class _Reader:
    """Checked access to a message's tensors and fields.

    As a context manager it turns the errors of malformed fields into ``WireError``.
    """

    def __init__(self, message: Message, columns: int, dtype: WireDtype) -> None:
        self.message = message
        self.columns = columns
        self.dtype = dtype

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, (KeyError, ValueError, TypeError, AttributeError, OverflowError)):
            raise WireError(
                f"a malformed {self.message.kind} message ({type(error).__name__}: {error})"
            ) from error

    def check(self, layout: str) -> None:
        """Raise ``WireError`` unless both ends have the same layout and number format."""
        theirs = self.message.fields.get("layout")
        if theirs != layout:
            short = theirs[:12] if isinstance(theirs, str) else theirs
            raise WireError(
                f"the adapter has layout {short}, expected {layout[:12]}; use the same model, lora "
                "section and package versions on the server and all sites"
            )
        if (dtype := self.message.fields.get("dtype")) != self.dtype:
            raise WireError(
                f"the message has numbers in {dtype}, but the federation uses {self.dtype}"
            )

    def adapters(self, name: str, dimensions: int) -> Tensor:
        """Return rows ``(P,)`` or ``(k, P)`` as float32."""
        return self._take(name, _DTYPES[self.dtype], dimensions, self.columns).float()

    def float32(self, name: str, dimensions: int | None) -> Tensor:
        """Return a float32 tensor."""
        return self._take(name, torch.float32, dimensions, None)

    def mask(self, name: str) -> Tensor:
        """Return a mask ``(P,)``."""
        return self._take(name, torch.bool, 1, self.columns)

    def _take(
        self, name: str, dtype: torch.dtype, dimensions: int | None, columns: int | None
    ) -> Tensor:
        tensor = self.message.tensors[name]
        fits = (
            tensor.dtype == dtype
            and dimensions in (None, tensor.dim())
            and (columns is None or tensor.shape[-1] == columns)
        )
        if not fits:
            size = "" if columns is None else f" with {columns} columns"
            raise WireError(
                f"{name} is {describe(tensor)}, expected {dimensions or 'any'} dimension(s) of "
                f"{str(dtype).removeprefix('torch.')}{size}"
            )
        return tensor

    def plan(self, fields: Mapping[str, Any]) -> Plan:
        match fields["name"]:
            case "train":
                return self._train(fields)
            case "in_turn":
                return InTurn(tuple(self._train(job) for job in fields["jobs"]))
            case "choose":
                return Choose(self.adapters(fields["rows"], 2))
            case "mixture":
                return self._mixture(fields)
            case other:
                raise WireError(f"an unknown plan {other!r}; install the same version everywhere")

    def served(self, fields: Mapping[str, Any]) -> Served:
        return self._mixture(fields) if "rows" in fields else self.adapters(fields["row"], 1)

    def _mixture(self, fields: Mapping[str, Any]) -> Mixture:
        return Mixture(self.adapters(fields["rows"], 2), self.float32(fields["weights"], 1))

    def _train(self, fields: Mapping[str, Any]) -> Train:
        privacy = fields["privacy"]
        phases: Sequence[str | None] = fields["phases"]
        return Train(
            self.adapters(fields["row"], 1),
            tuple(None if name is None else self.mask(name) for name in phases),
            None if fields["proximal"] is None else float(fields["proximal"]),
            None if fields["anchor"] is None else self.adapters(fields["anchor"], 1),
            logits=_logits(fields["logits"]),
            privacy=None
            if privacy is None
            else UpdatePrivacy(float(privacy["clip"]), float(privacy["noise"])),
        )

"""What travels between server and sites: tensors by name, and JSON beside them, as the bytes of a safetensors file.

Nothing is pickled, and nothing is taken on trust: whoever reads says which layout, number format and client it expects, and refuses
anything else. Numbers travel as float32 or bfloat16, as was agreed; merging weights, weights of examples, and what was added to the
backbone itself always as float32, and masks as truth values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Plan, Served, Train
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.stateful import describe

PROTOCOL = 1
"""Both ends must speak the same."""

WireDtype = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEADER = 8
"""Bytes at the start of a safetensors file that say how long its JSON header is."""


@dataclass(frozen=True)
class Message:
    """One message: what it is for, tensors by name, and whatever else it says, as JSON."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The message as it travels."""
        said = json.dumps(
            {"protocol": PROTOCOL, "kind": self.kind, "facts": self.facts}, ensure_ascii=False
        )
        whole: dict[str, Tensor] = {}
        held: set[int] = set()
        for name, tensor in self.tensors.items():
            value = tensor.detach().to("cpu").contiguous()
            memory = value.untyped_storage().data_ptr()
            whole[name] = (
                value.clone() if memory in held else value
            )  # safetensors takes no two views of one memory
            held.add(memory)
        return save(whole, metadata={"fedmerge": said})

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """Read a message. Raises ``WireError`` for bytes that are none, and for another version's."""
        try:
            length = int.from_bytes(data[:_HEADER], "little")
            said = json.loads(
                json.loads(data[_HEADER : _HEADER + length])["__metadata__"]["fedmerge"]
            )
            tensors = load(data)
            protocol, kind, facts = said["protocol"], said["kind"], said["facts"]
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(
                f"{len(data)} bytes that are no message ({type(error).__name__})"
            ) from error
        if protocol != PROTOCOL or not isinstance(kind, str) or not isinstance(facts, dict):
            raise WireError(
                f"a message of protocol {protocol!r}, and this end speaks {PROTOCOL}; install the same version everywhere"
            )
        return cls(kind, facts, tensors)


def kind_of(content: bytes) -> str:
    """The kind of a message that was just written, without its tensors."""
    length = int.from_bytes(content[:_HEADER], "little")
    return str(
        json.loads(json.loads(content[_HEADER : _HEADER + length])["__metadata__"]["fedmerge"])[
            "kind"
        ]
    )


def layout_digest(layout: AdapterLayout, shared: Mapping[str, Tensor]) -> str:
    """What both ends must have in common: names, shapes and order of an adapter's tensors, and names and shapes of those all share."""
    fixed = sorted((name, tuple(tensor.shape)) for name, tensor in shared.items())
    return sha256(f"{layout.to_json()}{fixed}".encode()).hexdigest()


# ---- writing -------------------------------------------------------------------------------------


class TensorTable:
    """Tensors that travel, each once: equal ones, such as what is trained and what is scored, share a place."""

    def __init__(self, dtype: WireDtype) -> None:
        self.dtype = _DTYPES[dtype]
        self.tensors: dict[str, Tensor] = {}

    def numbers(self, tensor: Tensor) -> str:
        return self._put(tensor.to(self.dtype))

    def exact(self, tensor: Tensor) -> str:
        return self._put(tensor.float())

    def mask(self, tensor: Tensor) -> str:
        return self._put(tensor.bool())

    def _put(self, tensor: Tensor) -> str:
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
) -> Message:
    """What a client is to do: ``train`` with a plan, ``score`` without one.

    Args:
        round: From 1; rounds completed where there is no plan.
        client: Its name.
        plan: What it is asked to do.
        served: What it is served with, to be scored before any training; None to score nothing.
        base: What the strategy has added to the backbone, ΔW ``(out, in)`` by module name.
        layout: ``layout_digest``.
        dtype: Number format of the adapters on their way.
    """
    luggage = TensorTable(dtype)
    facts = {
        "round": round,
        "client": client,
        "layout": layout,
        "dtype": dtype,
        "plan": None if plan is None else _plan(plan, luggage),
        "served": None if served is None else _served(served, luggage),
        "base": {module: luggage.exact(update) for module, update in base.items()},
    }
    return Message("score" if plan is None else "train", facts, luggage.tensors)


def _plan(plan: Plan, luggage: TensorTable) -> dict[str, Any]:
    match plan:
        case Train():
            return {"name": "train", **_train(plan, luggage)}
        case InTurn():
            return {"name": "in_turn", "jobs": [_train(job, luggage) for job in plan.jobs]}
        case Choose():
            return {"name": "choose", "rows": luggage.numbers(plan.rows)}
        case Mixture():
            return {"name": "mixture", **_mixture(plan, luggage)}
        case _:
            raise FederateError(
                f"strategy: the plan {type(plan).__name__} cannot travel to sites; "
                "only train, in turn, choose and mixture can"
            )


def _train(job: Train, luggage: TensorTable) -> dict[str, Any]:
    return {
        "row": luggage.numbers(job.row),
        "phases": [None if columns is None else luggage.mask(columns) for columns in job.phases],
        "proximal": job.proximal,
        "anchor": None if job.anchor is None else luggage.numbers(job.anchor),
        "privacy": None
        if job.privacy is None
        else {"clip": job.privacy.clip, "noise": job.privacy.noise},
    }


def _mixture(mixture: Mixture, luggage: TensorTable) -> dict[str, Any]:
    return {"rows": luggage.numbers(mixture.rows), "weights": luggage.exact(mixture.weights)}


def _served(served: Served, luggage: TensorTable) -> dict[str, Any]:
    return (
        _mixture(served, luggage)
        if isinstance(served, Mixture)
        else {"row": luggage.numbers(served)}
    )


def reply_message(reply: Reply, client: str, layout: str, dtype: WireDtype) -> Message:
    """A client's reply, as it travels."""
    facts = {
        "round": reply.round,
        "client": client,
        "layout": layout,
        "dtype": dtype,
        "size": reply.size,
        "train_loss": reply.train_loss,
        "seconds": reply.seconds,
        "served": reply.served,
        "finetuned": reply.finetuned,
        "choice": reply.choice,
    }
    tensors = {"deltas": reply.deltas.to(_DTYPES[dtype])}
    if reply.weights is not None:
        tensors["weights"] = reply.weights.float()
    return Message("reply", facts, tensors)


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteAssignment:
    """What a site reads from a ``train`` or ``score`` message."""

    round: int
    client: str
    plan: Plan | None
    served: Served | None
    base: Mapping[str, Tensor]


def read_assignment(
    message: Message, layout: str, columns: int, dtype: WireDtype
) -> RemoteAssignment:
    """Read what a client is to do.

    Args:
        message: Of kind ``train`` or ``score``.
        layout: The ``layout_digest`` of this end.
        columns: P of this end.
        dtype: What was agreed.

    Raises:
        WireError: It is for another layout or number format, or not of the form that such messages have.
    """
    reader = _Reader(message, columns, dtype)
    reader.check(layout)
    with reader:
        facts = message.facts
        base = {str(module): reader.exact(name, None) for module, name in facts["base"].items()}
        plan = None if facts["plan"] is None else reader.plan(facts["plan"])
        served = None if facts["served"] is None else reader.served(facts["served"])
        return RemoteAssignment(int(facts["round"]), str(facts["client"]), plan, served, base)
    raise AssertionError  # the block returns or raises


def read_reply(
    message: Message, index: int, client: str, layout: str, columns: int, dtype: WireDtype
) -> Reply:
    """Read a client's reply; what it says about numbers of examples, shapes and rounds is judged by the round loop.

    Args:
        message: Of kind ``reply``.
        index: The client's, in the federation.
        client: The name of the client that was asked.
        layout: The ``layout_digest`` of this end.
        columns: P of this end.
        dtype: What was agreed.

    Raises:
        WireError: It is another client's, or not of the form that replies have.
    """
    reader = _Reader(message, columns, dtype)
    reader.check(layout)
    with reader:
        facts = message.facts
        if facts["client"] != client:
            raise WireError(f"a reply of {facts['client']!r}, and {client!r} was asked")
        return Reply(
            index,
            reader.numbers("deltas", 2),
            int(facts["size"]),
            float(facts["train_loss"]),
            float(facts["seconds"]),
            _scores(facts["served"]),
            _scores(facts["finetuned"]),
            int(facts["choice"]),
            reader.exact("weights", 1) if "weights" in message.tensors else None,
            int(facts["round"]),
        )
    raise AssertionError  # the block returns or raises


def _scores(scores: Any) -> dict[str, float] | None:
    return None if scores is None else {str(name): float(value) for name, value in scores.items()}


class _Reader:
    """Takes tensors out of a message; within its block whatever else is wrong becomes a ``WireError``."""

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
            said = f"a {self.message.kind} message that is not as such messages are ({type(error).__name__}: {error})"
            raise WireError(said) from error

    def check(self, layout: str) -> None:
        """Raise ``WireError`` unless both ends have the same layout and number format."""
        theirs = self.message.facts.get("layout")
        if theirs != layout:
            said = theirs[:12] if isinstance(theirs, str) else theirs
            raise WireError(
                f"an adapter of layout {said}, and this end has {layout[:12]}; use the same model, lora and package versions everywhere"
            )
        if (found := self.message.facts.get("dtype")) != self.dtype:
            raise WireError(f"numbers as {found}, and {self.dtype} was agreed")

    def numbers(self, name: str, dimensions: int) -> Tensor:
        """Rows ``(P,)`` or ``(k, P)``, float32."""
        return self._take(name, _DTYPES[self.dtype], dimensions, self.columns).float()

    def exact(self, name: str, dimensions: int | None) -> Tensor:
        return self._take(name, torch.float32, dimensions, None)

    def mask(self, name: str) -> Tensor:
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
            wanted = f"{str(dtype).removeprefix('torch.')}{'' if columns is None else f' with {columns} columns'}"
            raise WireError(
                f"{name} is {describe(tensor)}, expected {dimensions or 'any'} dimension(s) of {wanted}"
            )
        return tensor

    def plan(self, said: Mapping[str, Any]) -> Plan:
        match said["name"]:
            case "train":
                return self._train(said)
            case "in_turn":
                return InTurn(tuple(self._train(job) for job in said["jobs"]))
            case "choose":
                return Choose(self.numbers(said["rows"], 2))
            case "mixture":
                return self._mixture(said)
            case other:
                return _unknown(other)

    def served(self, said: Mapping[str, Any]) -> Served:
        return self._mixture(said) if "rows" in said else self.numbers(said["row"], 1)

    def _mixture(self, said: Mapping[str, Any]) -> Mixture:
        return Mixture(self.numbers(said["rows"], 2), self.exact(said["weights"], 1))

    def _train(self, said: Mapping[str, Any]) -> Train:
        privacy = said["privacy"]
        phases: Sequence[str | None] = said["phases"]
        return Train(
            self.numbers(said["row"], 1),
            tuple(None if name is None else self.mask(name) for name in phases),
            None if said["proximal"] is None else float(said["proximal"]),
            None if said["anchor"] is None else self.numbers(said["anchor"], 1),
            privacy=None
            if privacy is None
            else UpdatePrivacy(float(privacy["clip"]), float(privacy["noise"])),
        )


def _unknown(name: object) -> NoReturn:
    raise WireError(
        f"a plan {name!r}, which this version does not know; install the same version everywhere"
    )

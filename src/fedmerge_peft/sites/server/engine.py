"""The engine of a federation across sites: its clients train and evaluate at their sites."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data import Client
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.base import check_same_work, make_strategy_context
from fedmerge_peft.errors import ClientError, FederateError, WireError
from fedmerge_peft.models.backbone import Backbone, load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.sites.config import Federation
from fedmerge_peft.sites.messages import assignment_message, layout_digest, read_reply
from fedmerge_peft.sites.server.roster import Roster, parse_label_counts, parse_site_summary
from fedmerge_peft.sites.site_data import placeholder_table
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.tasks import make_task
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import Plan, Served

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

Request = tuple[int, Callable[[], bytes]]
"""Number of a request, and the function that serializes its message when it is sent."""


class Transport(Protocol):
    """Connection between the server and the sites of a job."""

    @property
    def sites(self) -> Sequence[str]:
        """Names of the connected sites."""

    def send_and_receive(
        self, requests: Mapping[str, Sequence[Request]], deadline: float
    ) -> Iterator[tuple[str, int, bytes | str]]:
        """Send each site its requests, one after another, and yield the replies as they arrive.

        Args:
            requests: The requests of each site.
            deadline: Seconds from now within which every request gets a reply or fails.

        Yields:
            Site, number of the request, and the bytes of the reply or the reason why there is none.
        """


@dataclass
class Model:
    """Interface of the model for the round loop at the server."""

    config: Any
    device: torch.device
    base: Mapping[str, Tensor]
    """Additions to the backbone, sent to the sites with every assignment."""

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """Store the additions; see ``engines.base.Model``."""
        self.base = base


class RemoteEngine:
    """Engine whose clients are at sites.

    A client whose site is absent fails in every round of the job; the site can join the next job.
    """

    simulated = False

    def __init__(
        self,
        recipe: Recipe,
        federation: Federation,
        roster: Roster,
        transport: Transport,
        task: Task,
        backbone: Backbone,
        absent: Mapping[str, str],
    ) -> None:
        self.recipe = recipe
        self.federation = federation
        self.transport = transport
        self.task = task
        self.layout = layout_digest(backbone.layout, backbone.shared)
        self.accelerator: Accelerator = make_accelerator(
            recipe.training.model_copy(update={"device": "cpu"})
        )
        self.backbone = Model(backbone.config, backbone.device, {})
        self.absent = absent
        """Sites that take no part in this job, with the reasons."""
        self._model = backbone
        self._roster = roster
        self.clients = _clients(federation, roster)

    @classmethod
    def enroll(
        cls, recipe: Recipe, federation: Federation, roster: Roster, transport: Transport
    ) -> RemoteEngine:
        """Start a job: collect the sites' summaries, agree on labels, and load the model.

        Sites that enroll for the first time are added to the roster.

        Raises:
            FederateError: No site can take part; the message lists the reason for each site.
            FedMergeError: The server cannot load the model.
        """
        absent = {
            site: "it is not connected" for site in federation.sites if site not in transport.sites
        }
        connected = [site for site in federation.sites if site in transport.sites]
        enroll = Message("enroll", {"recipe": recipe.to_yaml(), "dtype": federation.wire_dtype})
        timeout = federation.start_deadline
        parsed: dict[str, dict[str, Any]] = {}
        for site, message in _broadcast(transport, connected, enroll, timeout, absent):
            with _failures_to(absent, site):
                parsed[site] = parse_site_summary(message.fields, federation.sites[site], site)
        summaries = {site: parsed[site] for site in connected if site in parsed}
        absent |= roster.agree_on_format(summaries, recipe)
        present = [site for site in summaries if site not in absent]
        _require_sites(present, absent)
        task, backbone = _load(recipe, roster)
        open_job = Message(
            "open",
            {
                "labels": roster.labels,
                "format": roster.format,
                "layout": layout_digest(backbone.layout, backbone.shared),
            },
            backbone.shared,
        )
        for site, message in _broadcast(transport, present, open_job, timeout, absent):
            with _failures_to(absent, site):
                clients = summaries[site]["clients"]
                counts = (
                    None  # private sites send none
                    if recipe.privacy.mode == "local"
                    else parse_label_counts(message.fields, clients, roster.labels)
                )
                roster.add_clients(clients, counts)
        _require_sites([site for site in present if site not in absent], absent)
        for site, reason in absent.items():
            log.warning("site %s is excluded from this job: %s", site, reason)
        return cls(recipe, federation, roster, transport, task, backbone, absent)

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` if the clients' work differs under this recipe."""
        check_same_work(
            self.recipe,
            recipe,
            "the sites have opened the job for another recipe",
            sections=("privacy",),
        )

    def strategy_context(self) -> StrategyContext:
        """Return the context from which a strategy is created."""
        return make_strategy_context(self._model, len(self.clients), self.recipe.seed)

    def label_counts(self) -> list[list[int]] | None:
        """Return the training examples of each label, clients × labels.

        Rows of clients that have not enrolled yet are zero. None for a task without labels, and
        with ``privacy.mode: local``.
        """
        if not self.task.labels or self.recipe.privacy.mode == "local":
            return None
        unknown = {"counts": [0] * len(self.task.labels)}
        return [self._roster.clients.get(client.name, unknown)["counts"] for client in self.clients]

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Train each client at its site; a missing or late reply yields a ``ClientError``."""
        lazily = Assignments.of(assignments)
        plans: dict[int, Plan] = {}

        def payload(index: int) -> bytes:
            assignment = lazily.make(index)
            plans[index] = assignment.plan
            return self._message(
                round,
                index,
                assignment.plan,
                assignment.served,
                hyperparameters=assignment.hyperparameters,
            )

        columns, dtype = self._model.layout.size, self.federation.wire_dtype
        payloads = {index: partial(payload, index) for index in lazily.clients}
        for index, reply in self._send_and_receive(payloads):
            plan = plans.pop(index, None) or lazily.make(index).plan
            name = self.clients[index].name
            try:
                message = _parse_reply(reply, "trained")
                yield plan, read_reply(message, index, name, self.layout, columns, dtype)
            except FederateError as error:
                yield plan, ClientError(name, round, str(error))

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Evaluate the adapter of each client at its site; yield scores by client index."""
        lazily = Assignments.of(served)

        def payload(index: int) -> bytes:
            return self._message(completed, index, None, lazily.make(index))

        results: dict[int, dict[str, float] | ClientError] = {}
        payloads = {index: partial(payload, index) for index in lazily.clients}
        for index, reply in self._send_and_receive(payloads):
            try:
                scores = _parse_reply(reply, "evaluated").fields.get("scores", ())
                if scores is None:  # from a private site
                    continue
                if not isinstance(scores, dict):
                    raise WireError("its scores are missing")
                results[index] = {str(name): float(value) for name, value in scores.items()}
            except (FederateError, TypeError, ValueError) as error:
                results[index] = ClientError(
                    self.clients[index].name, completed, f"evaluation after the round: {error}"
                )
        yield from sorted(results.items(), key=lambda result: result[0])

    def send_adapter(
        self, client: str, tensors: Mapping[str, Tensor], documents: Mapping[str, str]
    ) -> str | None:
        """Send a client its adapter; return the reason if it was not stored.

        Args:
            client: Name of the client.
            tensors: The adapter, in PEFT's saved form.
            documents: Texts that are stored with the adapter, by file name.
        """
        message = Message("adapter", {"client": client, **documents}, tensors)
        index = self.federation.clients.index(client)
        for _, reply in self._send_and_receive({index: message.to_bytes}):
            try:
                _parse_reply(reply, "adapter_stored")
            except FederateError as error:
                return str(error)
        return None

    def _message(
        self,
        round: int,
        index: int,
        plan: Plan | None,
        served: Served | None,
        **options: Hyperparameters,
    ) -> bytes:
        """Serialize a client's assignment."""
        name, base, dtype = self.clients[index].name, self.backbone.base, self.federation.wire_dtype
        return assignment_message(
            round, name, plan, served, base, self.layout, dtype, **options
        ).to_bytes()

    def _send_and_receive(
        self, payloads: Mapping[int, Callable[[], bytes]]
    ) -> Iterator[tuple[int, bytes | str]]:
        """Send payloads by client index; yield the replies, or the reasons for none."""
        requests: dict[str, list[Request]] = {}
        for index, payload in payloads.items():
            site = self.federation.site_of(self.clients[index].name)
            if site in self.absent:
                yield index, f"its site {site} takes no part in this job: {self.absent[site]}"
            else:
                requests.setdefault(site, []).append((index, payload))
        for _, index, reply in self.transport.send_and_receive(requests, self.federation.deadline):
            yield index, reply


def _load(recipe: Recipe, roster: Roster) -> tuple[Task, Backbone]:
    """Load task and model on the CPU; the task is built from a table without real examples."""
    recipe = recipe.model_copy(update={"task": recipe.task.with_format(roster.format)})
    with ExitStack() as stack:
        folder = model_folder(
            recipe.backbone.model, Path(stack.enter_context(TemporaryDirectory(prefix="fedmerge-")))
        )
        task = make_task(
            recipe, placeholder_table(recipe, roster.labels or (), roster.columns), folder
        )
        return task, load_backbone(
            recipe.backbone, recipe.lora, task, folder, torch.device("cpu"), recipe.seed
        )


def _clients(federation: Federation, roster: Roster) -> list[Client]:
    """Return all clients with their reported sizes; zero for clients that have not enrolled."""
    unknown = {"group": "", "train": 0, "validation": 0, "test": 0}
    clients = []
    for name in federation.clients:
        known = roster.clients.get(name, unknown)
        train, validation, test = (
            np.arange(known[part], dtype=np.int64) for part in ("train", "validation", "test")
        )
        clients.append(Client(name, train, validation, test, known["group"]))
    return clients


def _broadcast(
    transport: Transport,
    sites: Sequence[str],
    message: Message,
    deadline: float,
    absent: dict[str, str],
) -> list[tuple[str, Message]]:
    """Send one message to all sites; return the replies, and add failing sites to ``absent``."""
    payload = message.to_bytes()
    expected = {"enroll": "enrolled", "open": "opened"}[message.kind]
    replies: list[tuple[str, Message]] = []
    for site, _, reply in transport.send_and_receive(
        {site: [(0, lambda: payload)] for site in sites}, deadline
    ):
        with _failures_to(absent, site):
            replies.append((site, _parse_reply(reply, expected)))
    return replies


def _parse_reply(reply: bytes | str, kind: str) -> Message:
    """Parse a reply of the transport.

    Args:
        reply: The bytes of a message, or the reason why there is none.
        kind: The expected kind.

    Raises:
        FederateError: There is no reply, or the site reports an error.
        WireError: The bytes are not a message of this kind.
    """
    if isinstance(reply, str):
        raise FederateError(reply)
    message = Message.from_bytes(reply)
    if message.kind == "error":
        raise FederateError(str(message.fields.get("error")))
    if message.kind != kind:
        raise WireError(f"it sent a message of kind {message.kind!r}, expected {kind!r}")
    return message


@contextmanager
def _failures_to(absent: dict[str, str], site: str) -> Iterator[None]:
    """Catch a ``FederateError`` of the block and record it as the reason for the site's absence."""
    try:
        yield
    except FederateError as error:
        absent[site] = str(error)


def _require_sites(present: Sequence[str], absent: Mapping[str, str]) -> None:
    if not present:
        reasons = "\n".join(f"  {site}: {reason}" for site, reason in absent.items())
        raise FederateError(f"no site can take part:\n{reasons}")

"""Engine of a federation across sites: clients train and are evaluated at their sites."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data import Client
from fedmerge_peft.data.clients import Indices
from fedmerge_peft.engines.assignments import Assignment, Assignments
from fedmerge_peft.engines.base import check_same_work, make_strategy_context
from fedmerge_peft.errors import ClientError, FederateError, WireError
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.plugins import TASKS
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.sites.config import FederationFile
from fedmerge_peft.sites.fields import Enrolled, Evaluated, read_fields
from fedmerge_peft.sites.messages import assignment_message, read_reply
from fedmerge_peft.sites.server.enrollment import (
    agree_and_load,
    broadcast,
    failures_to,
    parse_reply,
    require_sites,
)
from fedmerge_peft.sites.server.roster import (
    NOT_ENROLLED,
    Roster,
    parse_label_counts,
    parse_site_summary,
)
from fedmerge_peft.sites.server.transport import Request, Transport
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.tasks.metrics import score_fault
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.plan import Plan, Served

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass
class ServerModel:
    """Model for the server's round loop: configuration, device, and additions to the backbone."""

    config: Any
    device: torch.device
    weights_digest: str
    base: Mapping[str, Tensor]
    """Additions to the backbone, ΔW by module name; sent with every plan and served model."""

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """Store the additions; see ``engines.base.Model``."""
        self.base = base


class RemoteEngine:
    """Engine that sends the work of each client to the client's site.

    A client whose site is absent fails in every round of the job; the site can join the next job.
    """

    simulated = False

    def __init__(
        self,
        recipe: Recipe,
        federation: FederationFile,
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
        self.layout = backbone.model_digest
        self.accelerator: Accelerator = make_accelerator(
            recipe.training.model_copy(update={"device": "cpu"})
        )
        self.backbone = ServerModel(backbone.config, backbone.device, backbone.weights_digest, {})
        self.absent = absent
        """Sites that do not take part in this job, with the reasons."""
        self._model = backbone
        self._roster = roster
        self.clients = _clients(federation, roster)

    @classmethod
    def enroll(
        cls, recipe: Recipe, federation: FederationFile, roster: Roster, transport: Transport
    ) -> RemoteEngine:
        """Start a job: collect the sites' summaries, agree on labels, and load task and model.

        The clients of sites that enroll for the first time are added to the roster.

        Raises:
            FederateError: No site can take part (the message has the reason for each site); or, in
                the first job, all examples have one label.
            FedMergeError: The server cannot load task or model.
        """
        absent = {
            site: "it is not connected" for site in federation.sites if site not in transport.sites
        }
        connected = [site for site in federation.sites if site in transport.sites]
        enroll = Message("enroll", {"recipe": recipe.to_yaml(), "dtype": federation.wire_dtype})
        timeout = federation.start_deadline
        parsed: dict[str, Enrolled] = {}
        for site, message in broadcast(transport, connected, enroll, timeout, absent):
            with failures_to(absent, site):
                parsed[site] = parse_site_summary(message, federation.sites[site], site)
        summaries = {site: parsed[site] for site in connected if site in parsed}
        task, backbone = agree_and_load(recipe, roster, summaries, absent)
        present = [site for site in summaries if site not in absent]
        open_job = Message(
            "open",
            {
                "labels": roster.labels,
                "format": roster.format,
                "layout": backbone.model_digest,
            },
            backbone.shared,
        )
        counted = roster.labels if recipe.task.counts_labels else None
        one_each = recipe.task.label_column is not None
        for site, message in broadcast(transport, present, open_job, timeout, absent):
            with failures_to(absent, site):
                clients = summaries[site].clients
                counts = (
                    None  # sites send no counts with ``privacy.mode: local``
                    if recipe.privacy.mode == "local"
                    else parse_label_counts(message, clients, counted, one_each=one_each)
                )
                roster.add_clients(clients, counts)
        require_sites([site for site in present if site not in absent], absent)
        for site, reason in absent.items():
            log.warning("site %s is excluded from this job: %s", site, reason)
        return cls(recipe, federation, roster, transport, task, backbone, absent)

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` if clients do other work under ``recipe`` than under the job's."""
        check_same_work(
            self.recipe,
            recipe,
            "the sites have opened the job for another recipe",
            sections=("privacy",),
        )

    def strategy_context(self) -> StrategyContext:
        """Return the context from which a strategy is created."""
        return make_strategy_context(self._model, len(self.clients), self.recipe)

    def label_counts(self) -> list[list[int]] | None:
        """Return the number of each client's training examples with each label, clients × labels.

        Rows of clients that have not enrolled yet are zero. Return None if the task counts no
        labels, or with ``privacy.mode: local``.
        """
        if not self.recipe.task.counts_labels or self.recipe.privacy.mode == "local":
            return None
        unknown = [0] * len(self.task.labels)
        entries = [self._roster.clients.get(client.name, NOT_ENROLLED) for client in self.clients]
        return [entry["counts"] or unknown for entry in entries]

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Train each client at its site; yield plans with replies as they arrive.

        A missing, late or invalid reply yields a ``ClientError`` in its place.
        """
        lazily = Assignments.of(assignments)
        plans: dict[int, Plan] = {}

        def payload(index: int) -> bytes:
            assignment = lazily.make(index)
            plans[index] = assignment.plan
            return self._message(round, index, assignment)

        columns, dtype = self._model.layout.size, self.federation.wire_dtype
        payloads = {index: partial(payload, index) for index in lazily.clients}
        for index, reply in self._send_and_receive(payloads):
            plan = plans.pop(index, None) or lazily.make(index).plan
            name = self.clients[index].name
            try:
                message = parse_reply(reply, "trained")
                answer = read_reply(message, index, name, self.layout, columns, dtype)
                self._check_scores(answer.served, answer.finetuned)
                yield plan, answer
            except FederateError as error:
                yield plan, ClientError(name, round, str(error))

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Evaluate each client's served model at its site; yield scores or errors by client index.

        A private site (``site.release``) sends no scores. Its clients are left out, unless the
        request fails.
        """
        lazily = Assignments.of(served)

        def payload(index: int) -> bytes:
            return self._message(completed, index, lazily.make(index))

        results: dict[int, dict[str, float] | ClientError] = {}
        payloads = {index: partial(payload, index) for index in lazily.clients}
        for index, reply in self._send_and_receive(payloads):
            try:
                answer = read_fields(Evaluated, parse_reply(reply, "evaluated"))
                if answer.scores is None:  # from a private site
                    continue
                self._check_scores(answer.scores)
                results[index] = answer.scores
            except FederateError as error:
                results[index] = ClientError(
                    self.clients[index].name, completed, f"evaluation after the round: {error}"
                )
        yield from sorted(results.items(), key=lambda result: result[0])

    def _check_scores(self, *scores: Mapping[str, float] | None) -> None:
        """Raise ``WireError`` for a score that is out of range or of a metric the task lacks."""
        name = self.recipe.task.name
        lowest_loss = 0.0 if TASKS[name].origin == "built-in" else -math.inf
        for values in scores:
            if fault := score_fault(values or {}, self.task.metrics, lowest_loss):
                raise WireError(fault)

    def send_adapter(
        self, client: str, tensors: Mapping[str, Tensor], documents: Mapping[str, str]
    ) -> str | None:
        """Send a client its adapter; return the reason if its site did not store it, else None.

        Args:
            client: Name of the client.
            tensors: The adapter, in PEFT's saved form.
            documents: Texts that are stored with the adapter, by file name.
        """
        message = Message("adapter", {"client": client, **documents}, tensors)
        index = self.federation.clients.index(client)
        for _, reply in self._send_and_receive({index: message.to_bytes}):
            try:
                parse_reply(reply, "adapter_stored")
            except FederateError as error:
                return str(error)
        return None

    def _message(self, round: int, index: int, work: Assignment | Served) -> bytes:
        """Serialize a client's assignment, or the model to evaluate."""
        name, base, dtype = self.clients[index].name, self.backbone.base, self.federation.wire_dtype
        return assignment_message(round, name, work, base, self.layout, dtype).to_bytes()

    def _send_and_receive(
        self, payloads: Mapping[int, Callable[[], bytes]]
    ) -> Iterator[tuple[int, bytes | str]]:
        """Send payloads by client index; yield each reply, or the reason for its absence."""
        requests: dict[str, list[Request]] = {}
        for index, payload in payloads.items():
            site = self.federation.site_of(self.clients[index].name)
            if site in self.absent:
                yield index, f"its site {site} takes no part in this job: {self.absent[site]}"
            else:
                requests.setdefault(site, []).append((index, payload))
        for _, index, reply in self.transport.send_and_receive(requests, self.federation.deadline):
            yield index, reply


def _clients(federation: FederationFile, roster: Roster) -> list[Client]:
    """Return all clients with their reported sizes; a client that has not enrolled has size 0."""
    entries = [(name, roster.clients.get(name, NOT_ENROLLED)) for name in federation.clients]
    return [
        Client(
            name,
            _indices(entry["train"]),
            _indices(entry["validation"]),
            _indices(entry["test"]),
            entry["group"],
        )
        for name, entry in entries
    ]


def _indices(number: int) -> Indices:
    """Return placeholders for the rows at a site; only the number of rows is used.

    All placeholders share the memory of one value, however many rows a site reports.
    """
    return np.broadcast_to(np.int64(0), number)

"""The engine of a federation across sites: what its clients do is done elsewhere, and comes back as messages."""

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
from fedmerge_peft.engines.base import check_same, make_strategy_context
from fedmerge_peft.errors import ClientError, FederateError, WireError
from fedmerge_peft.models.backbone import Backbone, load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.sites.config import Federation
from fedmerge_peft.sites.messages import Message, assignment_message, layout_digest, read_reply
from fedmerge_peft.sites.server.roster import Roster, counts_of, told_by
from fedmerge_peft.sites.site_data import stand_in
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.tasks import make_task
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.plan import Plan, Served

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

Request = tuple[int, Callable[[], bytes]]
"""A number to know its answer by, and what makes the message when it is its turn."""


class Transport(Protocol):
    """A way to sites, and back."""

    @property
    def sites(self) -> Sequence[str]:
        """Who is there in this job."""

    def ask(
        self, requests: Mapping[str, Sequence[Request]], deadline: float
    ) -> Iterator[tuple[str, int, bytes | str]]:
        """Send each site its letters, one after another, and hand over the answers as they come: site, number, and the answer's bytes.

        In place of an answer comes, in words, why there is none. Every letter is answered so, at the latest ``deadline`` seconds from now.
        """


@dataclass
class Model:
    """What the server needs of the model; ``set_base`` only notes what is to be sent along."""

    config: Any
    device: torch.device
    base: Mapping[str, Tensor]

    def set_base(self, base: Mapping[str, Tensor]) -> None:
        """As ``engines.base.Model``."""
        self.base = base


class RemoteEngine:
    """Clients at sites. One that is not there fails in each round that asks it, and comes in with the first job that its site is in."""

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
        """Sites that take no part in this job, and why."""
        self._model = backbone
        self._roster = roster
        self.clients = _clients(federation, roster)

    @classmethod
    def enrol(
        cls, recipe: Recipe, federation: Federation, roster: Roster, transport: Transport
    ) -> RemoteEngine:
        """Have the sites tell of their data, agree on labels, load the model, and have the sites load it.

        The roster gains those who come for the first time.

        Raises:
            FederateError: No site takes part; has every site's own reason.
            FedMergeError: The model cannot be loaded here.
        """
        absent = {
            site: "it is not connected" for site in federation.sites if site not in transport.sites
        }
        everyone = [site for site in federation.sites if site in transport.sites]
        told: dict[str, dict[str, Any]] = {}
        asking = Message("enrol", {"recipe": recipe.to_yaml(), "dtype": federation.wire_dtype})
        for site, message in _each(transport, everyone, asking, federation.start_deadline, absent):
            with _blaming(site, absent):
                told[site] = told_by(message.facts, federation.sites[site], site)
        told = {site: told[site] for site in everyone if site in told}
        absent |= roster.settle(told, recipe)
        present = [site for site in told if site not in absent]
        _check_some(present, absent)
        task, backbone = _load(recipe, roster)
        opening = Message(
            "open",
            {
                "labels": roster.labels,
                "format": roster.format,
                "layout": layout_digest(backbone.layout, backbone.shared),
            },
            backbone.shared,
        )
        for site, message in _each(transport, present, opening, federation.start_deadline, absent):
            with _blaming(site, absent):
                roster.enter(
                    told[site]["clients"],
                    counts_of(message.facts, told[site]["clients"], roster.labels),
                )
        _check_some([site for site in present if site not in absent], absent)
        for site, why in absent.items():
            log.warning("site %s takes no part in this job: %s", site, why)
        return cls(recipe, federation, roster, transport, task, backbone, absent)

    def check_serves(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` unless clients would do under this recipe just what they do here."""
        check_same(
            self.recipe,
            recipe,
            "the sites have opened the job for a recipe that says otherwise",
            also=("privacy",),
        )

    def strategy_context(self) -> StrategyContext:
        """What a strategy starts from."""
        return make_strategy_context(self._model, len(self.clients), self.recipe.seed)

    def label_counts(self) -> list[list[int]] | None:
        """Training examples of each label, clients × labels; zeros for those who have not told yet."""
        if not self.task.labels:
            return None
        nothing = {"counts": [0] * len(self.task.labels)}
        return [self._roster.clients.get(each.name, nothing)["counts"] for each in self.clients]

    def train_clients(
        self, round: int, assignments: Iterable[tuple[int, Assignment]]
    ) -> Iterator[tuple[Plan, Reply | ClientError]]:
        """Have each client's site carry out its plan.

        A reply that misses the federation's deadline is a ``ClientError``.
        """
        lazily = Assignments.of(assignments)
        plans: dict[int, Plan] = {}

        def content(index: int) -> bytes:
            assignment = lazily.make(index)
            plans[index] = assignment.plan
            name = self.clients[index].name
            return self._content(round, name, assignment.plan, assignment.served)

        columns, dtype = self._model.layout.size, self.federation.wire_dtype
        requests = {index: partial(content, index) for index in lazily.clients}
        for index, answer in self._ask(requests):
            plan = plans.pop(index, None) or lazily.make(index).plan
            name = self.clients[index].name
            try:
                message = _opened(answer, "reply")
                yield plan, read_reply(message, index, name, self.layout, columns, dtype)
            except FederateError as error:
                yield plan, ClientError(name, round, str(error))

    def evaluate_clients(
        self, served: Iterable[tuple[int, Served]], completed: int = 0
    ) -> Iterator[tuple[int, dict[str, float] | ClientError]]:
        """Score what each client is served with, at its site."""
        lazily = Assignments.of(served)

        def content(index: int) -> bytes:
            return self._content(completed, self.clients[index].name, None, lazily.make(index))

        outcomes: dict[int, dict[str, float] | ClientError] = {}
        requests = {index: partial(content, index) for index in lazily.clients}
        for index, answer in self._ask(requests):
            try:
                scores = _opened(answer, "scored").facts.get("scores")
                if not isinstance(scores, dict):
                    raise WireError("its scores are missing")
                outcomes[index] = {str(name): float(value) for name, value in scores.items()}
            except (FederateError, TypeError, ValueError) as error:
                cause = f"scored after the round: {error}"
                outcomes[index] = ClientError(self.clients[index].name, completed, cause)
        yield from sorted(outcomes.items(), key=lambda pair: pair[0])

    def hand_over(
        self, client: str, tensors: Mapping[str, Tensor], documents: Mapping[str, str]
    ) -> str | None:
        """Give a client its adapter, in PEFT's saved form; why it did not arrive, in words, or None."""
        message = Message("adapter", {"client": client, **documents}, tensors)
        index = self.federation.clients.index(client)
        for _, answer in self._ask({index: message.to_bytes}):
            try:
                _opened(answer, "kept")
            except FederateError as error:
                return str(error)
        return None

    def _content(self, round: int, client: str, plan: Plan | None, served: Served | None) -> bytes:
        dtype = self.federation.wire_dtype
        return assignment_message(
            round, client, plan, served, self.backbone.base, self.layout, dtype
        ).to_bytes()

    def _ask(self, work: Mapping[int, Callable[[], bytes]]) -> Iterator[tuple[int, bytes | str]]:
        requests: dict[str, list[Request]] = {}
        for index, letter in work.items():
            site = self.federation.site_of(self.clients[index].name)
            if site in self.absent:
                yield index, f"its site {site} takes no part in this job: {self.absent[site]}"
            else:
                requests.setdefault(site, []).append((index, letter))
        for _, index, answer in self.transport.ask(requests, self.federation.deadline):
            yield index, answer


def _load(recipe: Recipe, roster: Roster) -> tuple[Task, Backbone]:
    """The task and the model, on the CPU, as far as a server without data can have them."""
    if recipe.task.name == "causal-lm":
        recipe = recipe.model_copy(
            update={"task": recipe.task.model_copy(update={"format": roster.format})}
        )
    with ExitStack() as stack:
        folder = model_folder(
            recipe.backbone.model, Path(stack.enter_context(TemporaryDirectory(prefix="fedmerge-")))
        )
        task = make_task(recipe, stand_in(recipe, roster.labels or (), roster.columns), folder)
        return task, load_backbone(
            recipe.backbone, recipe.lora, task, folder, torch.device("cpu"), recipe.seed
        )


def _clients(federation: Federation, roster: Roster) -> list[Client]:
    """All clients, with as many examples as they told; none for those who have not."""
    nothing = {"group": "", "train": 0, "validation": 0, "test": 0}
    clients = []
    for name in federation.clients:
        known = roster.clients.get(name, nothing)
        train, validation, test = (
            np.arange(known[part], dtype=np.int64) for part in ("train", "validation", "test")
        )
        clients.append(Client(name, train, validation, test, known["group"]))
    return clients


def _each(
    transport: Transport,
    sites: Sequence[str],
    message: Message,
    deadline: float,
    absent: dict[str, str],
) -> list[tuple[str, Message]]:
    """Send all sites one message. The answers of those who give one; the others are entered as absent."""
    content = message.to_bytes()
    expected = {"enrol": "enrolled", "open": "opened"}[message.kind]
    found: list[tuple[str, Message]] = []
    for site, _, answer in transport.ask(
        {site: [(0, lambda: content)] for site in sites}, deadline
    ):
        with _blaming(site, absent):
            found.append((site, _opened(answer, expected)))
    return found


def _opened(answer: bytes | str, kind: str) -> Message:
    """An answer's message. Raises ``FederateError`` with what the site, or the way to it, says instead."""
    if isinstance(answer, str):
        raise FederateError(answer)
    message = Message.from_bytes(answer)
    if message.kind == "error":
        raise FederateError(str(message.facts.get("error")))
    if message.kind != kind:
        raise WireError(
            f"it answered with a message of kind {message.kind!r}, and {kind!r} was expected"
        )
    return message


@contextmanager
def _blaming(site: str, absent: dict[str, str]) -> Iterator[None]:
    """Within, what is a site's fault is entered as the reason for its absence."""
    try:
        yield
    except FederateError as error:
        absent[site] = str(error)


def _check_some(present: Sequence[str], absent: Mapping[str, str]) -> None:
    if not present:
        said = "\n".join(f"  {site}: {why}" for site, why in absent.items())
        raise FederateError(f"no site takes part:\n{said}")

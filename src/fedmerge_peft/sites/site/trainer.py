"""A site's trainer: it holds the site's data and the model, and answers what the server asks, or says why it does not."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.engines.score_cache import KnownScores
from fedmerge_peft.errors import ClientError, FedMergeError, RefusedError, WireError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.loading import loads
from fedmerge_peft.serving.export import folder_name
from fedmerge_peft.sites.config import (
    RECIPE,
    SITE,
    Federation,
    SitePrivacy,
    SiteSettings,
    refusal,
    refused_modules,
)
from fedmerge_peft.sites.messages import (
    Message,
    RemoteAssignment,
    layout_digest,
    read_assignment,
    reply_message,
)
from fedmerge_peft.sites.site.audit import AuditEntry, record
from fedmerge_peft.sites.site_data import check_data, numbered, read_data, tell
from fedmerge_peft.strategies.differential_privacy import update_privacy as agreed_privacy
from fedmerge_peft.training.plan import InTurn, Plan, Train
from fedmerge_peft.training.update_privacy import UpdatePrivacy, apply_update_privacy
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.vectors import row_norms

log = logging.getLogger(__name__)

_LONGEST = 2**18
"""Characters of a document that the server sends along with an adapter."""


class Trainer:
    """One site: its clients, their examples, and one engine for all of them, loaded when the first job opens and kept."""

    def __init__(self, kit: Path, site: str, settings: SiteSettings) -> None:
        """Read the site's data and look at them.

        Raises:
            DataError: They cannot be read, or are not what the recipe says.
            FederateError: They are not the clients' that the federation knows, or not what the site wants them to be.
        """
        self.kit = kit
        self.settings = settings
        self.federation = Federation.read(kit)
        agreed = Recipe.load(kit / RECIPE)
        if why := refusal(agreed, agreed, settings.allow):
            raise RefusedError(f"the recipe in the kit asks for more than {SITE} allows: {why}")
        self.agreed = agreed
        self.recipe = settings.applied(agreed)
        if settings.data is None:
            raise RefusedError(
                f"{kit / SITE} names no data; give --data FILE, or write data: {{path: FILE}}"
            )
        self.data = read_data(settings.data, self.recipe, self.federation.sites[site], kit)
        check_data(self.data, settings.checks)
        self.told = tell(self.data, self.recipe)
        self._opened: tuple[object, LocalEngine] | None = None

    def answer(self, content: bytes) -> bytes:
        """Do what a message asks. What fails or is refused is answered in words, without a traceback or an example."""
        try:
            message = Message.from_bytes(content)
            answer, entry = self._answer(message)
        except FedMergeError as error:
            cause = error.cause if isinstance(error, ClientError) else str(error)
            log.warning("%s", error)
            answer = Message(
                "error", {"error": cause, "refused": isinstance(error, RefusedError | WireError)}
            )
            entry = AuditEntry("error", refused=cause)
        except Exception as error:
            log.exception("a message could not be answered")
            answer = Message(
                "error",
                {
                    "error": f"{type(error).__name__} at the site; its log has more",
                    "refused": False,
                },
            )
            entry = AuditEntry("error", refused=type(error).__name__)
        sent = answer.to_bytes()
        record(self.kit, entry, sent)
        return sent

    def _answer(self, message: Message) -> tuple[Message, AuditEntry]:
        match message.kind:
            case "enrol":
                return self._enrol(message), AuditEntry("enrol")
            case "open":
                return self._open(message), AuditEntry("open")
            case "train" | "score":
                return self._work(message)
            case "adapter":
                return self._keep(message), AuditEntry("adapter", str(message.facts.get("client")))
            case other:
                raise WireError(
                    f"a message of kind {other!r}, which this version does not know; install the same version everywhere"
                )

    # ---- the beginning of a job --------------------------------------------------------------------

    def _enrol(self, message: Message) -> Message:
        asked = loads(Recipe, str(message.facts.get("recipe")), "the server's recipe")
        if why := refusal(asked, self.agreed, self.settings.allow):
            raise RefusedError(why)
        if (dtype := message.facts.get("dtype")) != self.federation.wire_dtype:
            raise WireError(
                f"the server wants numbers as {dtype}, and the kit says {self.federation.wire_dtype}"
            )
        return Message("enrolled", asdict(self.told))

    def _open(self, message: Message) -> Message:
        facts = message.facts
        labels, layout = facts.get("labels"), facts.get("layout")
        opened = (labels, facts.get("format"))
        if self._opened is None or self._opened[0] != opened:
            self._opened = None  # room for the next
            data = numbered(self.data, self.recipe, labels or ())
            recipe = self.recipe
            if recipe.task.name == "causal-lm":
                recipe = recipe.model_copy(
                    update={"task": recipe.task.model_copy(update={"format": facts.get("format")})}
                )
            self._opened = (opened, LocalEngine.from_data(recipe, data))
        engine = self._engine
        keys = [entry.key for entry in engine.backbone.layout.entries]
        if why := refused_modules(keys, self.settings.allow):
            raise RefusedError(why)
        most = self.settings.allow.max_parameters
        if most is not None and engine.backbone.layout.size > most:
            raise RefusedError(
                f"lora: an update has {engine.backbone.layout.size} numbers, and allow.max_parameters in {SITE} is {most}"
            )
        ours = layout_digest(engine.backbone.layout, engine.backbone.shared)
        if layout != ours:
            raise WireError(
                f"the server's adapters have layout {str(layout)[:12]}, and the model here gives {ours[:12]}: "
                "the model, PEFT or this package differ; install the same versions, and take the same model, everywhere"
            )
        shared = {
            name: message.tensors[name].float()
            for name in engine.backbone.shared
            if name in message.tensors
        }
        if {name: value.shape for name, value in shared.items()} != {
            name: value.shape for name, value in engine.backbone.shared.items()
        }:
            raise WireError("the tensors that all adapters share are not those of this layout")
        engine.backbone.load_shared(shared)
        engine.known = KnownScores()  # what is known was scored with what was shared before
        return Message(
            "opened",
            {"layout": ours, "size": engine.backbone.layout.size, "counts": engine.label_counts()},
        )

    @property
    def opened(self) -> bool:
        """Whether the model is loaded: what ``open`` does."""
        return self._opened is not None

    @property
    def _engine(self) -> LocalEngine:
        if self._opened is None:
            raise WireError("work came before the job was opened")
        return self._opened[1]

    # ---- rounds ------------------------------------------------------------------------------------

    def _work(self, message: Message) -> tuple[Message, AuditEntry]:
        engine = self._engine
        layout = layout_digest(engine.backbone.layout, engine.backbone.shared)
        dtype = self.federation.wire_dtype
        work = read_assignment(message, layout, engine.backbone.layout.size, dtype)
        index = next(
            (number for number, client in enumerate(engine.clients) if client.name == work.client),
            None,
        )
        if index is None:
            raise WireError(f"work for client {work.client!r}, who is not at this site")
        engine.backbone.set_base(work.base)
        if work.plan is None:
            return self._score(engine, index, work), AuditEntry("score", work.client, work.round)
        privacy = self._update_privacy(work.plan)
        plan = replace(work.plan, privacy=None) if isinstance(work.plan, Train) else work.plan
        assignment = Assignment(plan, work.served)
        ((_, reply),) = engine.train_clients(work.round, [(index, assignment)])
        if isinstance(reply, ClientError):
            raise reply
        trained = reply.deltas
        norm = norm_trained = float(row_norms(trained.reshape(1, -1)))
        if privacy is not None:
            reply = replace(reply, deltas=filtered(trained, plan, privacy))
            norm = float(row_norms(reply.deltas.reshape(1, -1)))
        return reply_message(reply, work.client, layout, dtype), AuditEntry(
            "train", work.client, work.round, norm, norm_trained
        )

    def _score(self, engine: LocalEngine, index: int, work: RemoteAssignment) -> Message:
        if work.served is None:
            raise WireError("a client is to be scored, and with nothing")
        ((_, scores),) = engine.evaluate_clients([(index, work.served)], work.round)
        if isinstance(scores, ClientError):
            raise scores
        return Message("scored", {"client": work.client, "scores": scores})

    def _update_privacy(self, plan: Plan) -> UpdatePrivacy | None:
        """What is done to an update before it leaves: the strictest of what the plan, the recipe in the kit and the site say."""
        asked = plan.privacy if isinstance(plan, Train) else None
        if asked is None and self.agreed.privacy.mode != "none":
            raise RefusedError(
                f"privacy.mode: the recipe in the kit says {self.agreed.privacy.mode}, and the server asks for updates without it"
            )
        return stricter(self.settings.privacy, asked, agreed_privacy(self.agreed.privacy))

    # ---- the end -----------------------------------------------------------------------------------

    def _keep(self, message: Message) -> Message:
        """Write an adapter that one of this site's clients is given, as a PEFT folder; its configuration is this site's own."""
        client, layout = message.facts.get("client"), self._engine.backbone.layout
        if client not in [each.name for each in self.data.clients]:
            raise WireError(f"an adapter for {client!r}, who is not at this site")
        expected = {entry.key: entry.shape for entry in layout.entries} | {
            k: tuple(v.shape) for k, v in self._engine.backbone.shared.items()
        }
        if {name: tuple(tensor.shape) for name, tensor in message.tensors.items()} != expected:
            raise WireError("an adapter that is not of this layout")
        folder = self.kit / "adapters" / folder_name(client)
        write_adapter(folder, message.tensors, self._config)
        for name in ("README.md", "weights.json"):
            if isinstance(text := message.facts.get(name), str) and len(text) <= _LONGEST:
                write_text(folder / name, text)
        log.warning("the adapter of %s is in %s", client, folder)
        return Message("kept")

    @cached_property
    def _config(self) -> Mapping[str, object]:
        config = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in self._engine.backbone.config.to_dict().items()
        }
        backbone = self.recipe.backbone
        return {
            **config,
            "base_model_name_or_path": backbone.model,
            "revision": backbone.revision,
            "inference_mode": True,
        }


def stricter(own: SitePrivacy, *others: UpdatePrivacy | None) -> UpdatePrivacy | None:
    """The shortest clip and the largest noise of what a site and others want; None where nobody wants anything."""
    wanted = [each for each in others if each is not None]
    clips = [clip for clip in (own.clip, *(each.clip for each in wanted)) if clip is not None]
    noise = max([own.noise, *(each.noise for each in wanted)])
    return UpdatePrivacy(min(clips, default=float("inf")), noise) if clips or noise else None


def filtered(deltas: Tensor, plan: Plan, privacy: UpdatePrivacy) -> Tensor:
    """Updates ``(k, P)`` as they leave, each row clipped and with noise in the columns that trained, from a seed that stays unknown."""
    if isinstance(plan, InTurn):
        phases = [job.phases for job in plan.jobs]
    else:
        phases = [plan.phases if isinstance(plan, Train) else (None,)] * len(deltas)
    return torch.stack(
        [
            apply_update_privacy(row, privacy, columns, secrets.randbits(63))
            for row, columns in zip(deltas, phases, strict=True)
        ]
    )

"""Trainer of a site: trains and evaluates its clients on the server's request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import ClientError, FedMergeError, RefusedError, WireError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.loading import loads
from fedmerge_peft.serving.export import folder_name
from fedmerge_peft.sites.config import (
    SITE_FILE,
    FederationFile,
    SiteSettings,
    load_kit_recipe,
    modules_refusal,
    recipe_refusal,
)
from fedmerge_peft.sites.fields import Enroll, Open, StoreAdapter, read_fields
from fedmerge_peft.sites.messages import (
    RemoteAssignment,
    read_assignment,
    reply_message,
    scores_in_range,
)
from fedmerge_peft.sites.site.audit import AuditEntry, record
from fedmerge_peft.sites.site.release import WITHHELD, ReleaseRules
from fedmerge_peft.sites.site_data import (
    check_data,
    read_site_data,
    site_summary,
    with_label_ids,
)
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import Plan, Train
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.ranges import MAX_REASON
from fedmerge_peft.util.stateful import describe
from fedmerge_peft.util.text import shortened
from fedmerge_peft.util.vectors import norm_fault, row_norms

log = logging.getLogger(__name__)


class Trainer:
    """Clients, examples and engine of one site; the engine is loaded for the first job and kept."""

    def __init__(self, kit: Path, site: str, settings: SiteSettings) -> None:
        """Read and check the site's data.

        Args:
            kit: The site's kit.
            site: Name of the site.
            settings: The site's settings.

        Raises:
            DataError: The data cannot be read, or do not fit the recipe.
            RecipeError: The kit's recipe is invalid, or lists plugins that the site does not allow.
            FederateError: The data belong to other clients or do not meet the site's checks, or the
                settings name no data, are contradictory or do not allow the kit's recipe.
        """
        self.kit = kit
        self.settings = settings
        self.federation = FederationFile.read(kit)
        agreed = load_kit_recipe(kit, settings.allow)
        if reason := recipe_refusal(agreed, agreed, settings.allow):
            raise RefusedError(
                f"the recipe in the kit exceeds the limits in {SITE_FILE}: {reason}; "
                "change the limit to allow it"
            )
        self.agreed = agreed
        self.release = ReleaseRules(kit, settings.privacy, agreed)
        self.recipe = settings.apply_to(agreed)
        if settings.data is None:
            raise RefusedError(
                f"{kit / SITE_FILE} names no data; use --data FILE, or write data: {{path: FILE}}"
            )
        clients = self.federation.sites[site]
        self.data = read_site_data(settings.data, self.recipe, clients, kit)
        check_data(self.data, settings.checks)
        self.summary = site_summary(self.data, self.recipe)
        self._open: tuple[object, LocalEngine] | None = None
        self._adds_to_backbone = _adds_to_backbone(agreed)

    def handle(self, payload: bytes) -> bytes:
        """Execute a request and return the reply, which the audit log records before it is sent.

        The reply to a failed or refused request is an error text without traceback. A private site
        does not send the cause of a failure (``WITHHELD``).

        Raises:
            OSError: The audit log cannot be written; the reply must not be sent.
        """
        try:
            reply, entry = self._dispatch(Message.from_bytes(payload))
        except FedMergeError as error:
            reason = error.cause if isinstance(error, ClientError) else str(error)
            log.warning("%s", error)
            refused = isinstance(error, RefusedError | WireError)
            sent = WITHHELD if self.release.private and not refused else reason
            text = shortened(sent, MAX_REASON)
            reply = Message("error", {"error": text, "refused": refused})
            entry = AuditEntry("error", error=reason)
        except Exception as error:
            log.exception("a message could not be handled")
            name = type(error).__name__
            text = (
                WITHHELD
                if self.release.private
                else f"{name} at the site; see its trainer's output"
            )
            reply = Message("error", {"error": text, "refused": False})
            entry = AuditEntry("error", error=name)
        message = reply.to_bytes()
        record(self.kit, entry, message)
        return message

    def _dispatch(self, message: Message) -> tuple[Message, AuditEntry]:
        match message.kind:
            case "enroll":
                return self._enroll(message), AuditEntry("enroll")
            case "open":
                return self._open_job(message), AuditEntry("open")
            case "train" | "evaluate":
                return self._train_or_evaluate(message)
            case "adapter":
                fields = read_fields(StoreAdapter, message)
                self._store_adapter(fields, message.tensors)
                return Message("adapter_stored"), AuditEntry("adapter", fields.client)
            case other:
                raise WireError(
                    f"the server sent a message of unknown kind {other!r}; "
                    "install the same version on the server and all sites"
                )

    # ---- start of a job --------------------------------------------------------------------------

    def _enroll(self, message: Message) -> Message:
        fields = read_fields(Enroll, message)
        # Plugins of the server's recipe are not imported: a site imports only those of its kit.
        requested = loads(
            Recipe, fields.recipe, "the server's recipe", plugins="ignore", foreign=True
        )
        if reason := recipe_refusal(requested, self.agreed, self.settings.allow):
            raise RefusedError(reason)
        if fields.dtype != self.federation.wire_dtype:
            raise WireError(
                f"the server sends numbers in {fields.dtype}, but the site's kit has "
                f"{self.federation.wire_dtype} (wire_dtype); use kits of one `federate prepare` "
                "on the server and all sites"
            )
        self._adds_to_backbone = _adds_to_backbone(requested)
        return Message("enrolled", asdict(self.release.summary(self.summary)))

    def _open_job(self, message: Message) -> Message:
        fields = read_fields(Open, message)
        labels, layout = fields.labels, fields.layout
        key = (labels, fields.format)
        if self._open is None or self._open[0] != key:
            self._open = None  # frees the memory of the previous engine
            data = with_label_ids(self.data, self.recipe, labels or ())
            task = self.recipe.task.with_format(fields.format)
            recipe = self.recipe.model_copy(update={"task": task})
            self._open = (key, LocalEngine.from_data(recipe, data))
        engine = self._engine
        backbone = engine.backbone
        keys = [entry.key for entry in backbone.layout.entries]
        if reason := modules_refusal(keys, self.settings.allow):
            raise RefusedError(reason)
        limit = self.settings.allow.max_parameters
        if limit is not None and backbone.layout.size > limit:
            raise RefusedError(
                f"lora: an update has {backbone.layout.size} values, "
                f"and allow.max_parameters in {SITE_FILE} is {limit}; raise it to allow this job"
            )
        ours = backbone.model_digest
        if layout != ours:
            raise WireError(
                f"the server's model and adapters have the digest {layout[:12]}, and this site's "
                f"have {ours[:12]}: the weights, PEFT or fedmerge-peft differ; use the same "
                "weights and the same versions on the server and all sites"
            )
        shared = {name: value for name, value in message.tensors.items() if name in backbone.shared}
        _check_tensors(shared, _shapes(backbone.shared), "tensors shared by all adapters")
        backbone.load_shared(shared)
        engine.clear_caches()  # their content depends on the shared tensors
        counts = self.release.label_counts(engine.label_counts())
        return Message("opened", {"layout": ours, "size": backbone.layout.size, "counts": counts})

    @property
    def is_open(self) -> bool:
        """True if an ``open`` message has loaded the model."""
        return self._open is not None

    @property
    def _engine(self) -> LocalEngine:
        if self._open is None:
            raise WireError(
                "the server's request needs the model, which the site has not loaded for this job; "
                "see the output of the site"
            )
        return self._open[1]

    # ---- rounds ----------------------------------------------------------------------------------

    def _train_or_evaluate(self, message: Message) -> tuple[Message, AuditEntry]:
        engine = self._engine
        layout = engine.backbone.model_digest
        dtype = self.federation.wire_dtype
        assignment = read_assignment(message, layout, engine.backbone.layout.size, dtype)
        client, plan = assignment.client, assignment.plan
        names = [local.name for local in engine.clients]
        if client not in names:
            raise WireError(
                f"the server sent an assignment for client {client!r}, which is not at this site; "
                "use kits of one `federate prepare` on the server and all sites"
            )
        index = names.index(client)
        if assignment.base and not self._adds_to_backbone:
            raise RefusedError(
                "the server sent an addition to the backbone, but no strategy of its recipe "
                "makes one; install the same version on the server and all sites"
            )
        engine.backbone.set_base(assignment.base)
        if plan is None:
            reply = self._evaluate(engine, index, assignment)
            return reply, AuditEntry("evaluate", client, assignment.round)
        self._check_hyperparameters(assignment.hyperparameters)
        privacy = self.release.update_privacy(plan)
        self.release.charge(client, plan, privacy)
        local = self._local_assignment(plan, assignment)
        ((_, trained),) = engine.train_clients(assignment.round, [(index, local)])
        size = engine.clients[index].size
        released = self.release.reply(trained, index, size, plan, privacy)
        norm, unfiltered = (
            float(row_norms(one.deltas.reshape(1, -1))) if isinstance(one, Reply) else None
            for one in (released, trained)
        )
        entry = AuditEntry("train", client, assignment.round, norm, unfiltered)
        return reply_message(released, client, layout, dtype), entry

    def _local_assignment(self, plan: Plan, assignment: RemoteAssignment) -> Assignment:
        """Return the assignment for the site's engine, without the plan's clipping and noise.

        ``ReleaseRules.reply`` clips and adds noise. At a private site, the assignment also requests
        no scores and no validation losses.
        """
        return Assignment(
            replace(plan, privacy=None) if isinstance(plan, Train) else plan,
            None if self.release.private else assignment.served,
            assignment.hyperparameters,
            assignment.validated and not self.release.private,
        )

    def _evaluate(self, engine: LocalEngine, index: int, assignment: RemoteAssignment) -> Message:
        if assignment.served is None:
            raise WireError(
                "the server requests an evaluation without an adapter; install the same version "
                "on the server and all sites"
            )
        if self.release.private:
            return Message("evaluated", {"client": assignment.client, "scores": None})
        served = [(index, assignment.served)]
        ((_, scores),) = engine.evaluate_clients(served, assignment.round)
        if isinstance(scores, ClientError):
            raise scores
        return Message(
            "evaluated", {"client": assignment.client, "scores": scores_in_range(scores)}
        )

    def _check_hyperparameters(self, requested: Hyperparameters) -> None:
        """Check that the server sets exactly those keys that are auto in the kit's ``training``.

        With ``training.steps``, the server may leave out ``epochs``, which is then not used.

        Raises:
            RefusedError: The kit's recipe has a number for a key that the server sets.
            WireError: A key is auto in the kit's recipe, and the server does not set it.
        """
        training = self.agreed.training
        for key, value in requested.to_dict().items():
            agreed = getattr(training, key)
            if value is not None and agreed != "auto":
                raise RefusedError(
                    f"training.{key} is {agreed} in the kit's recipe, so the server must not send "
                    f"a value for it; it sent {value}. Run the recipe of the kits on the server"
                )
            if value is None and agreed == "auto" and not (key == "epochs" and training.steps):
                raise WireError(
                    f"training.{key} is auto in the kit's recipe, but the server sent no value; "
                    "run the recipe of the kits on the server"
                )

    # ---- end of the run --------------------------------------------------------------------------

    def _store_adapter(self, fields: StoreAdapter, tensors: Mapping[str, Tensor]) -> None:
        """Write a client's adapter as a PEFT folder, with the site's ``LoraConfig``."""
        client, backbone = fields.client, self._engine.backbone
        if client not in [local.name for local in self.data.clients]:
            raise WireError(
                f"the server sent an adapter for client {client!r}, which is not at this site; "
                "use kits of one `federate prepare` on the server and all sites"
            )
        expected = {entry.key: entry.shape for entry in backbone.layout.entries}
        expected |= _shapes(backbone.shared)
        _check_tensors(tensors, expected, f"tensors of an adapter for {client}")
        folder = self.kit / "adapters" / folder_name(client)
        write_adapter(folder, tensors, self._config)
        write_text(folder / "README.md", fields.readme)
        write_text(folder / "weights.json", fields.weights)
        log.info("the adapter of %s is in %s", client, folder)

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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], which: str
) -> None:
    """Raise ``WireError`` unless tensors from the server are float32, in range, and of ``shapes``.

    Args:
        tensors: Tensors by name.
        shapes: Expected shapes by name.
        which: Description of the tensors, for the error.
    """
    if _shapes(tensors) != shapes:
        raise WireError(
            f"the server sent {which} that differ from this site's in name or shape; use the same "
            "package versions on server and sites"
        )
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise WireError(
                f"the server sent the tensor {name}, which is {describe(value)}, expected float32"
            )
        if fault := norm_fault(value.reshape(1, -1)):
            raise WireError(f"the server sent the tensor {name}, which is {fault}")


def _adds_to_backbone(recipe: Recipe) -> bool:
    return any(strategy.adds_to_backbone for strategy in (recipe.strategy, *recipe.baselines))

"""What server and sites are told beside the recipe: the federation's own facts, and what each site decides for itself.

federation.json   in every kit: who takes part, where the server is, how adapters travel, how long a round may take
site.yaml         in a site's kit, written by the site: its data, its device, its batch size; what it lets out, and what it allows

Nothing here imports torch or nvflare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from fedmerge_peft.errors import FederateError, RecipeError
from fedmerge_peft.recipe import Recipe, yaml_document
from fedmerge_peft.recipe.diff import differing, flat, written
from fedmerge_peft.recipe.section import Boolean, Fraction, Scalar, Section
from fedmerge_peft.recipe.yaml_document import Mark, dotted
from fedmerge_peft.util.text import printable

FEDERATION = "federation.json"
SITE = "site.yaml"
RECIPE = "recipe.yaml"
RUN = "run"
"""The run directory's name in the server's kit."""
OPERATOR = "operator@federation.local"
"""Who submits jobs; the name in the operator's certificate."""
ADDRESS = "FEDMERGE_TRAINER"
"""Environment variable with the socket's path; without it a job trains in its own process."""
KIT = "FEDMERGE_KIT"
"""Environment variable with the path of the site's kit."""
SETTINGS = "FEDMERGE_SITE_SETTINGS"
"""Environment variable with a site's settings as JSON."""
REFUSED = 2
"""Exit code of a child that has said what is wrong, and would say it again."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_TAKEN = ("server", "operator", "authority", "sites")
_SERVERS = (
    "name",
    "rounds",
    "evaluation.every",
    "tracking",
    "strategy",
    "baselines",
    "clients",
    "robustness",
    "data",
)
"""Parts of the recipe that change nothing of what a site does."""


class Federation(Section):
    """``federation.json``: what server, sites and operator have in common."""

    project: str
    """Name of the federation; in all of its certificates."""
    host: str
    """Where sites and operator reach the server: a name, or an address."""
    port: Annotated[int, Field(gt=0, lt=65536)]
    """TCP port of the server, the only one."""
    sites: dict[str, list[str]]
    """The clients of each site, by name; in this order they are the clients of the run."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of adapters and updates on their way."""
    segment: PositiveInt = 10
    """Rounds in a job. Who was away comes in with the next one."""
    deadline: PositiveInt = 3600
    """Seconds that a site has for its part of a round."""
    start_deadline: PositiveInt = 1800
    """Seconds that sites have, at the start of a job, to read their data and load the model."""

    @classmethod
    def read(cls, kit: Path) -> Federation:
        """Raises ``FederateError`` for a folder that is no kit."""
        try:
            return cls.model_validate_json((kit / FEDERATION).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FederateError(
                f"{kit}: no kit of a federation ({FEDERATION}: {_first_line(error)}); fedmerge federate prepare makes one"
            ) from error

    def write(self, kit: Path) -> None:
        """Raises ``RunError``."""
        from fedmerge_peft.util.files import write_json

        write_json(kit / FEDERATION, self.model_dump())

    @property
    def clients(self) -> list[str]:
        """All clients, site after site."""
        return [client for clients in self.sites.values() for client in clients]

    def site_of(self, client: str) -> str:
        """The site that holds a client."""
        return next(site for site, clients in self.sites.items() if client in clients)


def check_names(sites: Mapping[str, list[str]]) -> None:
    """Raise ``FederateError`` for names that cannot be those of sites, and for clients that appear twice."""
    for site in sites:
        if not _NAME.fullmatch(site) or site in _TAKEN:
            raise FederateError(
                f"--sites: {site!r} is no name for a site: letters, digits, - and _, at most 63, and none of {', '.join(_TAKEN)}"
            )
    clients = [client for held in sites.values() for client in held]
    if repeated := sorted({name for name in clients if clients.count(name) > 1}):
        raise FederateError(
            f"{', '.join(map(repr, repeated))}: named more than once; each client is at one site"
        )


# ---- what a site decides -------------------------------------------------------------------------


class SiteData(Section):
    """Where a site's examples are; everything else about them is the recipe's."""

    path: str
    """A csv, tsv, json, jsonl or parquet file, a folder, or a hub id, with the columns that the recipe's task names."""
    client_column: str | None = None
    """Column that names the client of each row, where the site holds several. Default: all rows are one client's."""
    group_column: str | None = None
    """Column that names the group of each client, for reports."""
    split_column: str | None = None
    """Column that says train, validation or test of each row. Default: parts are set aside, as the recipe says."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Keep only rows whose column has this value, or one of these."""
    validation_fraction: Fraction | None = None
    """Part set aside for validation. Default: the recipe's."""
    test_fraction: Fraction | None = None
    """Part set aside for testing. Default: the recipe's."""


class SitePrivacy(Section):
    """What is done to every update before it leaves the site, whatever the federation asks for."""

    clip: PositiveFloat | None = None
    """Longest update (L2) that leaves. Default: no bound of the site's own."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on each number, from a seed that nobody else knows."""


class SiteChecks(Section):
    """What a site's data must be before anything is computed from them."""

    min_examples: PositiveInt = 1
    """Fewest training examples of each client: an update of a few tells much about each of them."""
    max_repeated: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Largest part of a client's rows that repeat another of its rows."""


class SiteLimits(Section):
    """The most that a recipe may ask of the site."""

    remote_code: Boolean = False
    """Whether Python code that comes with a model may run here."""
    models: list[str] | None = None
    """Backbones that may be used. Default: the one in the kit's recipe."""
    modules: list[str] | None = None
    """Last names of modules that may train, LoRA or whole, such as [q_proj, v_proj]. Default: those that the kit's recipe trains."""
    max_parameters: NonNegativeInt | None = None
    """Most numbers that an update may have. Default: no bound."""


class SiteSettings(Section):
    """``site.yaml``."""

    data: SiteData | None = None
    """Where the examples are; ``--data`` takes the place of its path."""
    device: str | None = None
    """auto, cpu, mps, cuda or cuda:1. Default: the recipe's."""
    batch_size: PositiveInt | None = None
    """Examples that pass through the model at once. It must divide the recipe's batch_size × gradient_accumulation: a step sees the same
    examples, in more or fewer parts."""
    process: Literal["attached", "job"] = "attached"
    """attached: one long-lived process holds model and data over all jobs, and is started again should it die. job: each job loads them
    in its own process, which is simpler and slower."""
    privacy: SitePrivacy = SitePrivacy()
    """The site's own filter on what leaves."""
    checks: SiteChecks = SiteChecks()
    """What the data must be."""
    allow: SiteLimits = SiteLimits()
    """The most that a recipe may ask for."""

    @classmethod
    def read(cls, path: Path) -> SiteSettings:
        """Raises ``FederateError`` with every fault, each with its line."""
        try:
            document = yaml_document.parse(path.read_text(encoding="utf-8"), Mark(str(path), 1))
        except OSError as error:
            raise FederateError(f"{path}: cannot be read: {error.strerror}") from error
        except (RecipeError, UnicodeDecodeError) as error:
            raise FederateError(str(error)) from error
        faults = [f"{fault.mark}: {dotted(fault.where)}: {fault.text}" for fault in document.faults]
        try:
            settings = cls.model_validate(document.value or {})
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            for each in error.errors():
                where = tuple(each["loc"])
                unknown = each["type"] == "extra_forbidden"
                said = (
                    f"not a site's to say; its file may have {known}, and the federation is the recipe's"
                    if unknown
                    else each["msg"]
                )
                faults.append(f"{document.mark(where)}: {dotted(where)}: {said}")
        if faults:
            raise FederateError(printable_lines(faults))
        return settings

    def with_data(self, path: Path | None) -> SiteSettings:
        """With the path that the command line gave."""
        if path is None:
            return self
        data = (
            SiteData(path=str(path))
            if self.data is None
            else self.data.model_copy(update={"path": str(path)})
        )
        return self.model_copy(update={"data": data})

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe as this site carries it out. Raises ``FederateError`` for a batch size that would change it."""
        training = recipe.training
        if self.device is not None:
            training = training.model_copy(update={"device": self.device})
        if self.batch_size is not None:
            step = training.batch_size * training.gradient_accumulation
            if step % self.batch_size:
                raise FederateError(
                    f"batch_size: {self.batch_size} does not divide the {step} examples of a step; the recipe has one update for them all"
                )
            training = training.model_copy(
                update={
                    "batch_size": self.batch_size,
                    "gradient_accumulation": step // self.batch_size,
                }
            )
        return recipe.model_copy(update={"training": training})


def refusal(asked: Recipe, agreed: Recipe, limits: SiteLimits) -> str | None:
    """Why a site does not do what a job's recipe asks, in words; None where it does.

    Args:
        asked: The recipe that the server sent.
        agreed: The recipe in the site's kit, which the site's people have read.
        limits: The most that the site allows.
    """
    theirs, ours = flat(asked), flat(agreed)
    keys = [
        key
        for key in differing([ours, theirs])
        if not any(key == part or key.startswith(f"{part}.") for part in _SERVERS)
    ]
    if keys:
        said = "; ".join(
            f"{key} is {written(theirs.get(key))}, and {written(ours.get(key))} in the kit"
            for key in keys
        )
        return f"the server's recipe is not the one in the kit: {said}"
    if asked.backbone.trust_remote_code and not limits.remote_code:
        return "backbone.trust_remote_code: code that comes with a model does not run here (allow.remote_code in site.yaml)"
    if limits.models is not None and asked.backbone.model not in limits.models:
        return f"backbone.model: {asked.backbone.model} is none of {', '.join(limits.models)} (allow.models in site.yaml)"
    return None


def refused_modules(keys: list[str], limits: SiteLimits) -> str | None:
    """Why a site does not train these tensors (names as PEFT saves them), in words; None where it does."""
    if limits.modules is None:
        return None
    trained = sorted({_module(key) for key in keys})
    if other := [name for name in trained if name not in limits.modules]:
        return f"lora: {', '.join(other)} would train, and only {', '.join(limits.modules)} may (allow.modules in site.yaml)"
    return None


def _module(key: str) -> str:
    """``query`` of ``base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight``, ``classifier`` of a head's tensor."""
    steps = key.split(".")
    adapter = next(
        (
            at
            for at, step in enumerate(steps)
            if step.startswith("lora_") or step == "modules_to_save"
        ),
        len(steps) - 1,
    )
    return steps[adapter - 1]


def printable_lines(lines: list[str]) -> str:
    """Lines of a message that may hold what others wrote."""
    return "\n".join(printable(line) for line in lines)


def _first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]


def read_json(path: Path) -> Any:
    """A JSON document; None where there is none. Raises ``FederateError`` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FederateError(f"{path}: not readable ({_first_line(error)})") from error

"""Settings of a federation in addition to its recipe: common settings, and those of each site.

federation.json   in every kit: the sites, the server's address, the wire format, the deadlines
site.yaml         in a site's kit, edited by the site: data, device, batch size, privacy, limits

This module imports neither torch nor nvflare.
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
from fedmerge_peft.recipe.data import Encoding, Quoting, Separator
from fedmerge_peft.recipe.diff import differing, flat, written
from fedmerge_peft.recipe.error_messages import required
from fedmerge_peft.recipe.loading import Consent, load
from fedmerge_peft.recipe.section import Boolean, Fraction, Scalar, Section
from fedmerge_peft.recipe.yaml_document import Mark, dotted
from fedmerge_peft.util.ranges import first_fault
from fedmerge_peft.util.text import printable, reason

FEDERATION_FILE = "federation.json"
SITE_FILE = "site.yaml"
RECIPE_FILE = "recipe.yaml"
RUN_FOLDER = "run"
"""Name of the run directory in the server's kit."""
OPERATOR = "operator@federation.local"
"""Name in the certificate of the operator, who submits jobs."""
ADDRESS_VARIABLE = "FEDMERGE_TRAINER"
"""Environment variable with the path of the trainer's socket; if unset, a job trains in its own
process."""
SOCKETS_VARIABLE = "FEDMERGE_SOCKETS"
"""Environment variable with the folder of the sockets between a machine's processes."""
KIT_VARIABLE = "FEDMERGE_KIT"
"""Environment variable with the path of the site's kit."""
SETTINGS_VARIABLE = "FEDMERGE_SITE_SETTINGS"
"""Environment variable with a site's settings as JSON."""
PERMANENT_FAILURE = 2
"""Exit code of a child process that has reported an error that a restart cannot fix."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_RESERVED_NAMES = ("server", "operator", "authority", "sites")
_SERVER_KEYS = (
    "name",
    "rounds",
    "evaluation.every",
    "stop",
    "tracking",
    "callbacks",
    "plugins",
    "strategy",
    "baselines",
    "clients",
    "robustness",
    "serving",
    "data",
)
"""Keys and sections in which the server's recipe may differ from the recipe in a site's kit."""
_MOST_NAMED = 10
"""Maximum number of clients or keys that a message names."""


class FederationFile(Section):
    """``federation.json``: settings common to server, sites and operator."""

    project: str
    """Name of the federation; part of all its certificates."""
    host: str
    """Host name or address at which sites and operator reach the server."""
    port: Annotated[int, Field(gt=0, lt=65536)]
    """The only TCP port on which the server listens."""
    sites: dict[str, list[str]]
    """Names of each site's clients, by site, in the order of the run's clients."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of adapters and updates in messages."""
    segment: PositiveInt = 10
    """Rounds per job: each job runs one segment of the run. A site that is absent when a job starts
    can join the next job."""
    deadline: PositiveInt = 3600
    """Maximum time, in seconds, that a site may take to train its clients in a round, or for a
    separate evaluation of its clients."""
    start_deadline: PositiveInt = 1800
    """Maximum time, in seconds, that a site may take to read its data at the start of a job, and
    again to load the model."""

    @classmethod
    def read(cls, kit: Path) -> FederationFile:
        """Read the file of a kit. Raises ``FederateError`` if the folder is not a kit."""
        try:
            return cls.model_validate_json((kit / FEDERATION_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else reason(error)
            place = f"{kit}: not a federation kit ({FEDERATION_FILE}: {fault})"
            raise FederateError(f"{place}; fedmerge federate prepare creates kits") from error

    def write(self, kit: Path) -> None:
        """Write the file into a kit. Raises ``RunError`` if it cannot be written."""
        from fedmerge_peft.util.files import write_json

        write_json(kit / FEDERATION_FILE, self.model_dump())

    @property
    def clients(self) -> list[str]:
        """Names of all clients, site by site."""
        return [client for clients in self.sites.values() for client in clients]

    def site_of(self, client: str) -> str:
        """Return the name of a client's site."""
        return next(site for site, clients in self.sites.items() if client in clients)


def check_names(sites: Mapping[str, list[str]]) -> None:
    """Raise ``FederateError`` for invalid site names and for clients that appear twice."""
    for site in sites:
        if not _NAME.fullmatch(site) or site in _RESERVED_NAMES:
            raise FederateError(
                f"{site!r} is not a valid site name; use 1 to 63 characters from a-z, A-Z, 0-9, - "
                "and _, with a letter or digit first, and none of the names "
                f"{', '.join(_RESERVED_NAMES)}"
            )
    clients = [client for site_clients in sites.values() for client in site_clients]
    if repeated := sorted({name for name in clients if clients.count(name) > 1}):
        raise FederateError(
            f"clients named more than once: {', '.join(map(repr, repeated[:_MOST_NAMED]))}"
            f"{', ...' * (len(repeated) > _MOST_NAMED)}; each client belongs to one site"
        )


# ---- settings of a site --------------------------------------------------------------------------


class SiteData(Section):
    """Location, format and splits of a site's examples; the recipe sets the rest of ``data``."""

    path: str
    """A csv, tsv, json, jsonl, parquet or arrow file, a folder, or a hub id, with the columns of
    the recipe's task."""
    separator: Separator | None = None
    """Character between the fields of csv and tsv files. Default: a comma for .csv, a tab for
    .tsv."""
    quoting: Quoting = "auto"
    """Meaning of quotation marks in csv and tsv files: double (they enclose fields), none (they are
    text) or auto. See ``data.quoting`` of the recipe."""
    encoding: Encoding | None = None
    """Encoding of csv, tsv and json files. Default: utf-8, unless a byte order mark specifies
    another."""
    client_column: str | None = None
    """Column with the client of each row, for a site with several clients. Default: all rows
    belong to one client."""
    group_column: str | None = None
    """Column with the group of each client, for reports; used only with ``client_column``."""
    split_column: str | None = None
    """Column with the split of each row: train, validation or test. Default: the splits of the
    data; validation and test examples that the data lack are drawn as the recipe specifies."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Column values of the rows to keep: one value, or a list of alternatives, for each column."""
    validation_fraction: Fraction | None = None
    """Fraction of the examples used for validation. Default: the recipe's."""
    test_fraction: Fraction | None = None
    """Fraction of the examples used for testing. Default: the recipe's."""


class SitePrivacy(Section):
    """Clipping and noise that a site applies to every update before sending it."""

    clip: PositiveFloat | None = None
    """Largest L2 norm of an update. If the recipe also has a bound, the smaller one applies.
    Default: the recipe's bound, if it has one."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of the Gaussian noise that is added to each trained number of an update.
    If the recipe also requests noise, the larger value applies. The noise comes from the operating
    system's random generator. A site with noise sends no losses and no scores."""
    epsilon: PositiveFloat | None = None
    """Largest ε of a client, over all updates that it ever sends, at the δ of the recipe. The site
    counts updates in ``privacy.json`` and refuses a request that would exceed this ε. Default: with
    ``privacy.mode: local``, the ε of the kit's recipe with its baselines; otherwise no bound."""


class SiteChecks(Section):
    """Requirements on a site's data, checked before any training."""

    min_examples: PositiveInt = 1
    """Smallest number of training examples per client. An update from a few examples reveals
    much about each of them."""
    max_repeated: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Largest fraction of a client's rows that may repeat another of its rows."""


class SiteLimits(Section):
    """Limits on the recipes that a site accepts."""

    remote_code: Boolean = False
    """Allow Python code that comes with a model to run."""
    plugins: list[str] = []
    """Installed modules that the kit's recipe may import (its ``plugins``). Default: none."""
    models: list[str] | None = None
    """Backbones that a recipe may use. Default: the one in the kit's recipe."""
    modules: list[str] | None = None
    """Modules that may be trained, with LoRA or in full, by the last part of their names, such as
    [q_proj, v_proj]. Default: the modules that the kit's recipe trains."""
    max_parameters: NonNegativeInt | None = None
    """Largest number of values in an update. Default: no bound."""


class SiteSettings(Section):
    """``site.yaml``: the settings of one site."""

    data: SiteData | None = None
    """Location of the examples; ``--data`` replaces its path."""
    device: str | None = None
    """auto, cpu, mps, cuda or cuda:1. Default: the recipe's."""
    batch_size: PositiveInt | None = None
    """Examples in one pass through the model. The number must divide the recipe's
    batch_size × gradient_accumulation, so that a step covers the same examples in more or fewer
    passes. Default: the recipe's."""
    process: Literal["attached", "job"] = "attached"
    """attached: one long-lived process keeps model and data for all jobs, and is restarted if it
    dies. job: each job loads them in its own process, which is simpler and slower."""
    privacy: SitePrivacy = SitePrivacy()
    """Clipping and noise on the site's updates."""
    checks: SiteChecks = SiteChecks()
    """Requirements on the data."""
    allow: SiteLimits = SiteLimits()
    """Limits on the recipe."""

    @classmethod
    def read(cls, path: Path) -> SiteSettings:
        """Read ``site.yaml``. Raises ``FederateError`` with every error and its line."""
        try:
            document = yaml_document.parse(path.read_text(encoding="utf-8"), Mark(str(path), 1))
        except (OSError, RecipeError, UnicodeDecodeError) as error:
            place = "" if isinstance(error, RecipeError) else f"{path}: cannot be read: "
            raise FederateError(f"{place}{reason(error)}") from error
        errors = [f"{fault.mark}: {dotted(fault.where)}: {fault.text}" for fault in document.faults]
        try:
            settings = cls.model_validate(document.value or {})
        except ValidationError as invalid:
            for detail in invalid.errors():
                location = tuple(detail["loc"])
                section: Any = cls
                for key in location[:-1]:
                    section = required(section.model_fields[key].annotation)
                text = (
                    f"unknown key; {dotted(location[:-1]) or SITE_FILE} may set "
                    f"{', '.join(section.model_fields)}, and the recipe sets everything else"
                    if detail["type"] == "extra_forbidden"
                    else detail["msg"]
                )
                errors.append(f"{document.mark(location)}: {dotted(location)}: {text}")
        if errors:
            raise FederateError("\n".join(map(printable, errors)))
        return settings

    def with_data(self, path: Path | None) -> SiteSettings:
        """Return the settings with the data path from the command line; unchanged if it is None."""
        if path is None:
            return self
        data = (
            SiteData(path=str(path))
            if self.data is None
            else self.data.model_copy(update={"path": str(path)})
        )
        return self.model_copy(update={"data": data})

    def apply_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this site's device and batch size.

        ``training.prefix_disk`` is 0, because the recipe comes from outside the site: hidden
        states of examples are cached on disk only if the site sets ``FEDMERGE_PREFIX_DISK``.

        Raises:
            FederateError: The batch size does not divide the examples of a step.
        """
        training = recipe.training.model_copy(update={"prefix_disk": 0.0})
        if self.device is not None:
            training = training.model_copy(update={"device": self.device})
        if self.batch_size is not None:
            step = training.batch_size * training.gradient_accumulation
            if step % self.batch_size:
                raise FederateError(
                    f"batch_size in {SITE_FILE} is {self.batch_size}, which does not divide "
                    f"{step}, the recipe's batch_size × gradient_accumulation; choose a divisor"
                )
            training = training.model_copy(
                update={
                    "batch_size": self.batch_size,
                    "gradient_accumulation": step // self.batch_size,
                }
            )
        return recipe.model_copy(update={"training": training})


def load_kit_recipe(kit: Path, limits: SiteLimits) -> Recipe:
    """Import the plugins that a site allows, and return the recipe of its kit.

    Raises ``RecipeError`` if the recipe is invalid or lists other plugins.
    """
    remedy = f"if you trust it, add it to allow.plugins in {SITE_FILE}"
    consent = Consent(limits.plugins, remedy)
    return load(Recipe, kit / RECIPE_FILE, plugins=consent, foreign=True)


def recipe_refusal(requested: Recipe, agreed: Recipe, limits: SiteLimits) -> str | None:
    """Return the reason why a site refuses a job's recipe; None if it accepts.

    Args:
        requested: The recipe that the server sent.
        agreed: The recipe in the site's kit.
        limits: The limits of the site.
    """
    theirs, ours = flat(requested), flat(agreed)
    keys = [
        key
        for key in differing([ours, theirs])
        if not any(key == part or key.startswith(f"{part}.") for part in _SERVER_KEYS)
    ]
    if keys:
        differences = "; ".join(
            f"{key} is {written(theirs.get(key))}, but {written(ours.get(key))} in the kit"
            for key in keys[:_MOST_NAMED]
        )
        differences += "; ..." if len(keys) > _MOST_NAMED else ""
        remedy = "run the recipe of the kits on the server"
        return f"the server's recipe differs from the one in the kit ({differences}); {remedy}"
    if requested.backbone.trust_remote_code and not limits.remote_code:
        return (
            "backbone.trust_remote_code: this site does not run code that comes with a model "
            f"(allow.remote_code in {SITE_FILE})"
        )
    if limits.models is not None and requested.backbone.model not in limits.models:
        return (
            f"backbone.model: {requested.backbone.model} is not in allow.models of {SITE_FILE} "
            f"({', '.join(limits.models) or 'empty'})"
        )
    return None


def modules_refusal(keys: list[str], limits: SiteLimits) -> str | None:
    """Return the reason why a site refuses to train these tensors; None if it accepts.

    Args:
        keys: Names of the tensors, as PEFT saves them.
        limits: The limits of the site.
    """
    if limits.modules is None:
        return None
    trained = sorted({_module(key) for key in keys})
    if refused := [name for name in trained if name not in limits.modules]:
        return (
            f"lora: the recipe trains {', '.join(refused)}, but this site allows only "
            f"{', '.join(limits.modules) or 'none'} (allow.modules in {SITE_FILE})"
        )
    return None


def _module(key: str) -> str:
    """Return the last part of the module's name in a tensor's key.

    ``base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight`` gives ``query``;
    ``base_model.model.classifier.weight``, a tensor of a head, gives ``classifier``.
    """
    steps = key.split(".")
    adapter = next(
        (
            position
            for position, step in enumerate(steps)
            if step.startswith("lora_") or step == "modules_to_save"
        ),
        len(steps) - 1,
    )
    return steps[adapter - 1]


def read_json(path: Path) -> Any:
    """Read a JSON document; return None if there is no such file.

    Raises ``FederateError`` if the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FederateError(f"{path}: not readable ({reason(error)}); restore a copy") from error

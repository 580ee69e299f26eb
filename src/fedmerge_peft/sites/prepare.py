"""Kits of a federation: one for the server, one for the operator, one for each site."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fedmerge_peft.errors import FederateError, RecipeError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.sites.config import RECIPE_FILE, SITE_FILE, FederationFile, check_names
from fedmerge_peft.sites.wheel import SUMS, WHEEL, write_wheel
from fedmerge_peft.util.files import translated_write_errors, write_text

README = "README.md"


def federated_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the settings of a federation across sites.

    A client that fails is skipped in the round, unless the recipe sets ``clients.failures``.
    Clients always train one at a time, so that the result does not depend on the assignment of
    clients to sites.

    Raises:
        RecipeError: Sites cannot run the strategy or a baseline.
    """
    keys = ["strategy", *(f"baselines[{number}]" for number in range(len(recipe.baselines)))]
    for key, strategy in zip(keys, (recipe.strategy, *recipe.baselines), strict=True):
        if strategy.measures_features:
            raise RecipeError(
                f"{key}.name: {strategy.name} needs statistics of the clients' features, which "
                "sites do not return; use another strategy"
            )
        if recipe.privacy.mode != "none" and not strategy.federated:
            raise RecipeError(
                f"{key}.name: the server keeps the adapters of {strategy.name}, and "
                f"privacy.mode: {recipe.privacy.mode} does not protect them across sites; use "
                "another strategy"
            )
    overrides = ["training.clients_per_batch=1"]
    if "failures" not in recipe.clients.model_fields_set:
        overrides.append("clients.failures=skip")
    return recipe.replace(overrides)


def prepare(
    recipe: Recipe, federation: FederationFile, out: Path, *, wheel: bool = False
) -> str | None:
    """Write the kits into a new folder.

    Args:
        recipe: Recipe of the federation.
        federation: Settings of the federation, such as its sites and the server's address.
        out: A folder that is empty or does not exist.
        wheel: True to put a wheel of this package into each kit, for other machines.

    Returns:
        The wheel's SHA-256 sum; None if no wheel was requested or none can be written
        (``write_wheel``).

    Raises:
        FederateError: A name or the host is invalid, nvflare is not installed, or the wheel cannot
            be built.
        RecipeError: Sites cannot run a strategy of the recipe.
        RunExistsError: The folder is not empty.
        RunError: A file cannot be written.
    """
    check_names(federation.sites)
    RunDirectory.check_free(out)
    check_installed()
    from fedmerge_peft.sites.flare.provision import provision

    recipe = federated_recipe(recipe)
    with translated_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        provision(federation, out)
    kits = [out / "server", out / "operator", *(out / "sites" / site for site in federation.sites)]
    digest = _copy_wheel(kits) if wheel else None
    for kit in kits:
        federation.write(kit)
        write_text(kit / RECIPE_FILE, recipe.to_yaml())
    for site in federation.sites:
        write_text(out / "sites" / site / SITE_FILE, _SITE_YAML)
        write_text(out / "sites" / site / README, site_readme(federation, site, recipe, digest))
    return digest


def _copy_wheel(kits: Sequence[Path]) -> str | None:
    """Put a wheel of this package and its sum into each kit; return the sum.

    Return None if no wheel can be written (``write_wheel``).
    """
    with TemporaryDirectory() as name:
        digest = write_wheel(Path(name))
        if digest is not None:
            for kit in kits:
                with translated_write_errors(kit):
                    for file in (WHEEL, SUMS):
                        shutil.copyfile(Path(name, file), kit / file)
    return digest


def check_installed() -> None:
    """Raise ``FederateError`` if nvflare is not installed."""
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise FederateError(
            "nvflare is not installed; install the extra federate: pip install -e '.[federate]' "
            f"in a checkout of this package, or pip install './{WHEEL}[federate]' in the folder "
            "with the wheel"
        )


def site_readme(
    federation: FederationFile, site: str, recipe: Recipe, digest: str | None = None
) -> str:
    """Return the README of a site's kit: task, commands, data that leaves the site, and result.

    Args:
        federation: The federation.
        site: Name of the site.
        recipe: Recipe of the federation.
        digest: SHA-256 sum of the wheel in the kit; None if the kit has none.
    """
    clients = ", ".join(federation.sites[site])
    task, lora = recipe.task, recipe.lora
    columns = ", ".join(
        str(getattr(task, name))
        for name in (*task.usual_columns, "text_pair")
        if getattr(task, name, None)
    )
    if task.has_formats and getattr(task, "format", None) != "text":
        columns = ""  # other formats have other columns
    data = shlex.quote("your-data.csv")
    rounds = f"{recipe.rounds} round{'s' * (recipe.rounds > 1)}"
    return f"""# {site}, in the federation {federation.project}

This folder belongs to {site} alone. `startup/` holds its private key; anyone with the key can act
as {site}. Keep the folder on the machine that trains, readable by one user.

## The task

Train adapters (LoRA, r = {lora.r}) on `{recipe.backbone.model}` for {rounds}, on the
examples of: {clients}. `{RECIPE_FILE}` is the whole recipe. Read it: the trainer, which is the
process that reads the data, refuses a recipe of the server whose seed, model, adapter, task,
training, privacy or evaluation (except `evaluation.every`) differs from it.
Task: {task.name}{f", columns {columns}" if columns else ""}.

## The commands

{_installation(digest)}
Do not install the package by its name: it is not on the package index, where anyone may register
the name.

```bash
{"" if digest is None else f"sha256sum --check {SUMS}{chr(10)}"}pip install "./{WHEEL}[federate]"
fedmerge federate site . --data {data}
```

`fedmerge federate site` connects to `{federation.host}:{federation.port}` (outgoing TCP, TLS on
both sides; no port needs to be open at the site) and waits for the federation to start. The command
may be stopped and started again at any time; the site then rejoins after the current round.
`{SITE_FILE}` has further settings: path of the data, device, batch size, clipping and noise of the
updates, checks of the data, and limits on the recipe.
{_plugins(recipe)}
## Data that leaves the site

{_leaving(recipe)} No message of the trainer contains an example. `audit.jsonl` gets
one line for each message of the trainer: time, size in bytes, SHA-256 digest, and the norm of the
update.

## The result

After the last round, `adapters/` holds a PEFT folder for each client of the site, unless the method
mixes several adapters per client (`fedem`) or changes the backbone (`flora`, `fedex_lora`).
"""


def _installation(digest: str | None) -> str:
    """Return the README's text on the installation of the package."""
    if digest is None:
        return """Install the package from the wheel that the organizers of the federation give you.
First put the wheel into this folder, and compare its SHA-256 sum with the sum that they give you
through another channel, such as by telephone."""
    return f"""Install the package from the wheel in this folder. Its SHA-256 sum is

    {digest}

Compare it with the sum that the organizers give you through another channel, such as by
telephone, and with the sum in `{SUMS}`. `sha256sum --check` then compares the wheel with `{SUMS}`
(on macOS: `shasum -a 256 --check`)."""


def _plugins(recipe: Recipe) -> str:
    """Return the README's text on the modules that the recipe imports; empty if none."""
    if not recipe.plugins:
        return ""
    names = ", ".join(recipe.plugins)
    return f"""
The recipe imports code that runs on this machine: {names}. If you trust this code, install it, set
`plugins: [{names}]` under `allow` in `{SITE_FILE}`, and add `--trust-remote-code` to the command.
"""


def _leaving(recipe: Recipe) -> str:
    """Return the README's text on the data that leaves a site; it depends on ``privacy.mode``."""
    if recipe.privacy.mode == "local":
        return """At the start of each job, which runs some of the rounds: the names of the clients,
columns and labels, and the format of the texts. In each round, for each client: a clipped update of
its adapter, with noise. `privacy.json` counts these updates; the site sends no more updates of a
client whose budget (`privacy.epsilon` in `site.yaml`) is spent."""
    return """At the start of each job, which runs some of the rounds: the names and groups of the
clients, the names of the columns and labels, the format of the texts, the numbers of each client's
training, validation and test examples, and the number of its training examples with each label. In
each round, for each client: an update of its adapter, its number of training examples, its training
time, its training and validation losses, and its scores. Some strategies also request the client's
choice of an adapter, or its weights of several adapters. If a request fails, the reason is sent."""


_SITE_YAML = """# Settings of this site. The recipe sets everything else; other keys are refused.

data: null                # {path: FILE}; further keys such as client_column, split_column, filter
                          # --data FILE sets or replaces the path
device: null              # such as auto, cpu, cuda:0; null: the recipe's
batch_size: null          # a divisor of the recipe's batch_size x gradient_accumulation; null:
                          # the recipe's
process: attached         # attached: one trainer for all jobs; job: a new one for each

privacy:
  clip: null              # largest L2 norm of an update; null: only the recipe's bound
  noise: 0.0              # standard deviation of the noise on each number
  epsilon: null           # largest epsilon of a client; null: the recipe's if its privacy.mode is
                          # local, else no bound

checks:
  min_examples: 1         # smallest number of training examples of a client
  max_repeated: 1.0       # largest fraction of a client's rows that repeat an earlier one

allow:
  remote_code: false      # code that comes with a model; needs --trust-remote-code
  plugins: []             # installed modules that the recipe imports; needs --trust-remote-code
  models: null            # [names]; null: the recipe's
  modules: null           # [names of modules that may train]; null: the recipe's
  max_parameters: null    # largest number of values in an update; null: no bound
"""


def find_kit(path: Path, part: str) -> Path:
    """Return ``path / part`` if it is a kit, else ``path``. A kit is a folder with ``startup/``.

    Args:
        path: A kit, or the folder that ``prepare`` wrote and that holds the kits.
        part: Name of the kit in that folder; empty if ``path`` must be the kit itself.

    Raises:
        FederateError: Neither folder is a kit.
    """
    kit = path / part if (path / part / "startup").is_dir() else path
    if not (kit / "startup").is_dir():
        raise FederateError(
            f"{path}: not a federation kit (no startup/); give the folder of a kit, or create kits "
            "with: fedmerge federate prepare RECIPE --sites a,b --out DIR"
        )
    return kit

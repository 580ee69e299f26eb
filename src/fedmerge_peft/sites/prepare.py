"""From a recipe to a federation's kits: one for the server, one for the operator, one for each site."""

from __future__ import annotations

import shlex
from pathlib import Path

from fedmerge_peft.errors import FederateError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.sites.config import RECIPE, SITE, Federation, check_names
from fedmerge_peft.util.files import translated_write_errors, write_text

PAGE = "README.md"


def as_federated(recipe: Recipe) -> Recipe:
    """The recipe as a federation runs it.

    A site that fails costs its part of a round, unless the recipe itself says ``clients.failures``; and clients train one at a time, as
    they are not all in one place, so that a run does not depend on which site holds whom.
    """
    overrides = ["training.clients_per_batch=1"]
    if "failures" not in recipe.clients.model_fields_set:
        overrides.append("clients.failures=skip")
    return recipe.replace(overrides)


def prepare(recipe: Recipe, federation: Federation, out: Path) -> None:
    """Write the kits into a new folder.

    Raises:
        FederateError: Names, or a host, that cannot be; or nvflare is not installed.
        RunExistsError: The folder has something in it.
    """
    check_names(federation.sites)
    RunDirectory.check_free(out)
    check_installed()
    from fedmerge_peft.sites.flare.provision import provision

    recipe = as_federated(recipe)
    with translated_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        provision(federation, out)
    kits = [out / "server", out / "operator", *(out / "sites" / site for site in federation.sites)]
    for kit in kits:
        federation.write(kit)
        write_text(kit / RECIPE, recipe.to_yaml())
    for site in federation.sites:
        write_text(out / "sites" / site / SITE, _SITE)
        write_text(out / "sites" / site / PAGE, page(federation, site, recipe))


def check_installed() -> None:
    """Raise ``FederateError`` where nvflare is missing."""
    from importlib.util import find_spec

    if find_spec("nvflare") is None:
        raise FederateError("nvflare is not installed: pip install 'fedmerge-peft[federate]'")


def page(federation: Federation, site: str, recipe: Recipe) -> str:
    """What a site's people read: what is asked of them, what they run, and what leaves."""
    clients = ", ".join(federation.sites[site])
    task, lora = recipe.task, recipe.lora
    columns = ", ".join(
        str(getattr(task, name))
        for name in ("text", "text_pair", "image", "label")
        if getattr(task, name, None)
    )
    data = shlex.quote("your-data.csv")
    return f"""# {site}, in the federation {federation.project}

This folder is yours alone: `startup/` holds the private key of {site}. Whoever has it can speak as you. Keep it on the machine that
trains, readable by one user.

## What is asked of you

Train adapters (LoRA, r = {lora.r}) on `{recipe.backbone.model}` for {recipe.rounds} rounds, on the examples of: {clients}.
`{RECIPE}` is the whole recipe. Read it; your trainer takes no other, and the server cannot change what it says about model, adapter,
training, evaluation and privacy. Task: {task.name}{f", columns {columns}" if columns else ""}.

## What you run

```bash
pip install "fedmerge-peft[federate]"
fedmerge federate site . --data {data}
```

It connects to `{federation.host}:{federation.port}` (outgoing TCP, TLS on both sides; nothing needs to reach you), waits for the federation
to begin, and may be stopped and started again at any time: you are back after the round that runs. `{SITE}` says the same in a file, and
more: device, batch size, clip and noise on what leaves, checks of your data, the most that a recipe may ask for.

## What leaves

In each round, an update of your clients' adapters, their numbers of examples, training loss and scores. Before that, once: the clients'
names, how many examples they have of which label, and the labels' names. Never an example. `audit.jsonl` has a line for each message that
left: when, how many bytes, of which norm, with its SHA-256 sum.

## What you get

In the end, `adapters/` holds a PEFT folder for each of your clients.
"""


_SITE = """# What this site decides for itself. The recipe is the federation's, and other keys than these are refused.

data: null                # {path: FILE}, or --data FILE; client_column, split_column, filter as in a recipe
device: null              # auto, cpu, cuda:0; default: the recipe's
batch_size: null          # examples at once; must divide the recipe's batch_size x gradient_accumulation
process: attached         # attached: one trainer for all jobs; job: a new one for each

privacy:
  clip: null              # longest update (L2) that leaves; null for no bound of your own
  noise: 0.0              # standard deviation of the noise on each number

checks:
  min_examples: 1         # fewest training examples of a client
  max_repeated: 1.0       # largest part of rows that repeat another

allow:
  remote_code: false      # code that comes with a model
  models: null            # [names]; null for the recipe's
  modules: null           # [names of modules that may train]; null for the recipe's
  max_parameters: null    # numbers in an update
"""


def check_kit(kit: Path, part: str) -> Path:
    """A kit, given itself or as the folder that ``prepare`` made. Raises ``FederateError``."""
    found = kit / part if (kit / part / "startup").is_dir() else kit
    if not (found / "startup").is_dir():
        raise FederateError(
            f"{kit}: no kit of a federation (no startup/); fedmerge federate prepare RECIPE --sites a,b --out DIR makes them"
        )
    return found

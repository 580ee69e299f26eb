"""``fedmerge ls``, ``cp``, ``validate``, ``show`` and ``schema``: commands that run no recipe."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, app, shipped_names, write_file

if TYPE_CHECKING:
    from fedmerge_peft.recipe import Recipe


PluginModules = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="MODULE", help="Import this plugin first; repeatable."),
]


@app.command()
def ls(
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="List strategies, tasks and all other registered names, with their origin.",
        ),
    ] = False,
    plugins: PluginModules = None,
) -> None:
    """List the shipped recipes, or all names that a recipe may use.

    Example: fedmerge ls --all
    """
    if everything:
        _list_registered(plugins or [])
        return
    from fedmerge_peft.recipe.loading import shipped

    recipes = shipped()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.about}")


def _list_registered(modules: list[str]) -> None:
    """Print the names, origins and descriptions of all registered parts, such as strategies."""
    import fedmerge_peft.recipe  # registers the built-in parts  # noqa: F401
    from fedmerge_peft.plugins import REGISTRIES, import_installed, import_modules
    from fedmerge_peft.util.text import printable

    import_installed()
    import_modules(modules)
    width = max(len(entry.name) for registry in REGISTRIES for entry in registry)
    wide = max(len(entry.origin) for registry in REGISTRIES for entry in registry)
    for registry in REGISTRIES:
        print(f"{registry.plural}:" if len(registry) else f"{registry.plural}: none")
        for entry in registry:
            line = f"  {entry.name:<{width}}  {entry.origin:<{wide}}  {entry.about}"
            print(printable(line.rstrip()))


@app.command()
def cp(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of a shipped recipe; see fedmerge ls.",
            autocompletion=shipped_names,
        ),
    ],
    dest: Annotated[
        Path | None,
        typer.Argument(
            metavar="DEST",
            help="File to write, or an existing folder for NAME.yaml. Default: NAME.yaml in this "
            "folder.",
        ),
    ] = None,
) -> None:
    """Copy a shipped recipe into a file to edit. Existing files are never overwritten.

    Example: fedmerge cp quickstart my.yaml
    """
    import shlex

    from fedmerge_peft.errors import RecipeError
    from fedmerge_peft.recipe.error_messages import did_you_mean
    from fedmerge_peft.recipe.loading import shipped
    from fedmerge_peft.util.text import printable

    recipes = {recipe.name: recipe.path for recipe in shipped()}
    name = name.removesuffix(".yaml")
    if name not in recipes:
        raise RecipeError(
            printable(
                f"{name}: no such shipped recipe{did_you_mean(name, recipes)} "
                "(fedmerge ls lists the shipped recipes)"
            )
        )
    target = dest or Path(f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    write_file(target, recipes[name].read_text(encoding="utf-8"), "x")
    print(printable(f"Wrote {target}. Next: edit it, then fedmerge run {shlex.quote(str(target))}"))


@app.command()
def validate(
    recipe: RecipeSource,
    overrides: Overrides = None,
    data: Annotated[
        bool, typer.Option("--data", help="Read the data, too, and check columns and clients.")
    ] = False,
) -> None:
    """Check a recipe and summarize it in one line.

    With a preset, a second line lists the values of the preset's keys. The last line states the
    parts that were checked. The model is not loaded, and the data is read only with --data.

    Example: fedmerge validate quickstart strategy.adapters=4 --data
    """
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.recipe.diff import written
    from fedmerge_peft.recipe.presets import resolved
    from fedmerge_peft.util.text import printable

    loaded = Recipe.load(recipe, overrides or [])
    print(printable(_summary(loaded)))
    if values := resolved(loaded):
        settings = " ".join(f"{key}={written(value)}" for key, value in values.items())
        print(printable(f"preset {loaded.strategy.chosen_preset}: {settings}"))
    if not data:
        print("checked: keys and values. Not checked: the model, and the data (add --data)")
        return
    print(printable(_check_data(loaded)))


@app.command()
def show(recipe: RecipeSource, overrides: Overrides = None) -> None:
    """Print a recipe with overrides and defaults as YAML.

    The output is a complete recipe that fedmerge run accepts.

    Example: fedmerge show quickstart training.learning_rate=1e-4 > my.yaml
    """
    from fedmerge_peft.recipe import Recipe

    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # redirected output is a recipe: UTF-8
    print(Recipe.load(recipe, overrides or []).to_yaml(), end="")


@app.command()
def schema(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write to this file instead of standard output; an existing one is overwritten."
        ),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Print a reference instead: every key, type, bound and default."
        ),
    ] = False,
    plugins: PluginModules = None,
) -> None:
    """Print the JSON schema of recipes, with installed plugins, for editors.

    Editors with the YAML language server check and complete recipes that contain the comment

    # yaml-language-server: $schema=recipe.schema.json

    Example: fedmerge schema --out recipe.schema.json
    """
    import json

    from fedmerge_peft.plugins import import_installed, import_modules
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.recipe.markdown import reference

    import_installed()
    import_modules(plugins or [])
    as_json = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
    }
    text = reference() if markdown else json.dumps(as_json, indent=2) + "\n"
    if out is None:
        print(text, end="")
        return
    write_file(out, text)


def _check_data(recipe: Recipe) -> str:
    """Read a recipe's data, check the columns, and return a one-line summary."""
    from fedmerge_peft.data import federate_data
    from fedmerge_peft.tasks import check_table

    task = recipe.task
    federated = federate_data(recipe.data, task.label_column, recipe.seed, task.media_column)
    check_table(task, federated.table)
    sizes = {
        split: sum(len(getattr(client, split)) for client in federated.clients)
        for split in ("train", "validation", "test")
    }
    counts = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    count = len(federated.clients)
    return (
        f"checked: keys, values, and data ({count:,} client{'s' * (count != 1)}; {counts} "
        "examples); not the model"
    )


def _summary(recipe: Recipe) -> str:
    data, strategy = recipe.data, recipe.strategy
    count = strategy.requested_adapters
    adapters = "" if count is None else f" with {count} adapter{'s' * (count != 1)}"
    if count == "auto":
        adapters = " with an automatic number of adapters"
    clients = data.partition.summary()
    names = ", ".join(baseline.name for baseline in recipe.baselines)
    baselines = f"; baselines {names}" if names else ""
    rounds = f"{recipe.rounds} round{'s' * (recipe.rounds > 1)} of {recipe.task.name}"
    return (
        f"{recipe.name} is valid: {strategy.name}{adapters}, {rounds} on {recipe.backbone.model}, "
        f"data {data.path} ({clients}){baselines}"
    )

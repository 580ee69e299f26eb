"""The ``fedmerge`` program, without its verbs.

A verb is a function under ``@app.command()`` in a module of this package that ``main`` imports. Its module imports nothing but
typer at the top, so that ``fedmerge --help`` is quick; the rest is imported where the verb runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="fedmerge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the time to the first line
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeSource = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a path to a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as strategy.adapters=8.")]


def _version(wanted: bool) -> None:
    if wanted:
        from fedmerge_peft import __version__

        print(f"fedmerge-peft {__version__}")
        raise typer.Exit


@app.callback()
def fedmerge(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Federated LoRA fine-tuning, with an adapter of its own for every client.

    Begin with: fedmerge ls
    """

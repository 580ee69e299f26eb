"""The ``fedmerge`` program, without its verbs.

A verb is a function under ``@app.command()`` in a module of this package that ``main`` imports. Its module imports nothing but
typer at the top, so that ``fedmerge --help`` is quick; the rest is imported where the verb runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

EXIT_CODES = (
    "Exit codes: 0 all went well; 1 something is missing (doctor), or the reader of a pipe has gone; 2 an error with one message; "
    "130 and 143 stopped by Ctrl-C or SIGTERM. With FEDMERGE_TRACEBACK=1 in the environment errors keep their traceback."
)

app = typer.Typer(
    name="fedmerge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the time to the first line
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def shipped_names(incomplete: str) -> list[str]:
    """Shipped recipes whose names begin so, for the shell's completion."""
    from fedmerge_peft.recipe.loading import shipped

    return [recipe.name for recipe in shipped() if recipe.name.startswith(incomplete)]


RecipeSource = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name, or a path to a YAML file.",
        autocompletion=shipped_names,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as strategy.adapters=8.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from fedmerge_peft import __version__

        print(f"fedmerge-peft {__version__}")
        raise typer.Exit


@app.callback()
def fedmerge(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Federated LoRA fine-tuning, with an adapter of its own for every client.

    Begin with: fedmerge ls
    """

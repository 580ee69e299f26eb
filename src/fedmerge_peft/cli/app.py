"""The ``fedmerge`` program without its commands.

A command is a function with the decorator ``@app.command()`` in a module that ``main`` imports. The
function itself imports slow libraries, such as torch, so that ``fedmerge --help`` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

EXIT_CODES = (
    "Exit codes: 0 success; 1 a failed check (doctor), or a closed pipe; 2 an error, reported as "
    "one message; 130 and 143 stopped by Ctrl-C or SIGTERM. With FEDMERGE_TRACEBACK=1 in the "
    "environment, errors keep their traceback."
)

app = typer.Typer(
    name="fedmerge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would double the startup time
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def shipped_names(incomplete: str) -> list[str]:
    """Return the names of shipped recipes that start with ``incomplete``, for shell completion."""
    from fedmerge_peft.recipe.loading import shipped

    return [recipe.name for recipe in shipped() if recipe.name.startswith(incomplete)]


def write_file(path: Path, text: str, mode: Literal["w", "x"] = "w") -> None:
    """Write a text file. Mode ``w`` replaces an existing file; mode ``x`` only creates a new one.

    Raises:
        FedMergeError: The file cannot be written, or exists although the mode is ``x``.
    """
    from fedmerge_peft.errors import FedMergeError
    from fedmerge_peft.util.text import printable, reason

    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FedMergeError(
            printable(f"{path}: already exists and was not changed; give another name")
        ) from None
    except (OSError, ValueError) as error:
        raise FedMergeError(printable(f"{path} cannot be written: {reason(error)}")) from None


RecipeSource = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe, or path to a YAML file.",
        autocompletion=shipped_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as strategy.adapters=8."),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that the recipe names: plugins, and code that comes with a model.",
    ),
]


def _print_version(requested: bool) -> None:
    if requested:
        from fedmerge_peft import __version__

        print(f"fedmerge-peft {__version__}")
        raise typer.Exit


@app.callback()
def fedmerge(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Federated LoRA fine-tuning with a personal adapter for every client.

    Start with: fedmerge ls
    """

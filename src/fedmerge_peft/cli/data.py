"""``fedmerge data``: who holds what, before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, app


@app.command()
def data(
    recipe: RecipeSource,
    overrides: Overrides = None,
    by: Annotated[str | None, typer.Option(help="Column to count, instead of the label.")] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Write the picture of clients and labels to this PNG or SVG file too."),
    ] = None,
) -> None:
    """Show the clients: how many examples each holds, and of which labels.

    Example: fedmerge data quickstart --figure clients.png
    """
    from rich.console import Console

    from fedmerge_peft.data import federate_data, plot, terminal_chart
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.util.text import printable

    loaded = Recipe.load(recipe, overrides or [])
    label = getattr(loaded.task, "label", None)
    held = federate_data(loaded.data, label, loaded.seed)
    console = Console(highlight=False)
    console.print(terminal_chart(held, by or label, width=console.width))
    if figure is not None:
        plot(held, by or label, figure)
        console.print(printable(f"figure: {figure}"), markup=False)

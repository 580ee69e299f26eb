"""``fedmerge data``: show the clients and their labels, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, app


@app.command()
def data(
    recipe: RecipeSource,
    overrides: Overrides = None,
    by: Annotated[
        str | None, typer.Option(help="Column to count instead of the label column.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw clients and labels to this .png, .svg or .pdf file; overwritten."),
    ] = None,
    show: Annotated[
        int,
        typer.Option(
            min=0,
            help="Show the tokens of this many training examples, and mark those that have a "
            "loss. Loads the tokenizer.",
        ),
    ] = 0,
) -> None:
    """Show the number of each client's examples by split, and of its training examples by label.

    Example: fedmerge data quickstart --figure clients.png --show 3
    """
    from rich.console import Console

    from fedmerge_peft.data import federate_data, terminal_chart
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.util.text import printable

    loaded = Recipe.load(recipe, overrides or [])
    label = loaded.task.label_column
    federated = federate_data(loaded.data, label, loaded.seed, loaded.task.media_column)
    console = Console(highlight=False)
    console.print(terminal_chart(federated, by or label, width=console.width))
    if figure is not None:
        from fedmerge_peft.plotting.client_counts import ClientCounts

        ClientCounts(federated, by or label).save(figure)
        console.print(printable(f"figure: {figure}"), markup=False)
    if show:
        from fedmerge_peft.cli.shown_examples import show_examples

        show_examples(loaded, federated, show, console)

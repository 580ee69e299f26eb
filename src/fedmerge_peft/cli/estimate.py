"""``fedmerge estimate``: estimate memory and bytes on the wire, without loading weights or data."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fedmerge_peft.cli.app import Overrides, RecipeSource, app


@app.command()
def estimate(
    recipe: RecipeSource,
    overrides: Overrides = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of an example. Default: task.max_length, or the smaller of 1024 and the "
            "model's limit.",
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(
            help="Device to estimate for; this machine need not have it. Default: the recipe's. "
            "There, auto means cuda if the backbone is quantized or this machine has a GPU, else "
            "cpu."
        ),
    ] = None,
) -> None:
    """Estimate the memory of a run and the bytes on the wire, from the model's configuration.

    Weights are neither read nor downloaded. Only tasks on texts are supported.

    Example: fedmerge estimate quickstart training.batch_size=32 --device cuda
    """
    from rich.console import Console
    from rich.table import Table

    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.training import estimate as estimating
    from fedmerge_peft.util.text import printable

    loaded = Recipe.load(recipe, overrides or [])
    backbone, training = loaded.backbone, loaded.training
    kind = device or estimating.expected_device(loaded)
    result = estimating.estimate(
        loaded, estimating.load_config(backbone), length=length, device=kind
    )
    stored = backbone.dtype if backbone.quantization is None else backbone.quantization
    clients = f"{result.clients} × " if result.clients > 1 else ""
    rows = [
        ("backbone", result.backbone, f"{result.parameters:,} parameters, {stored}"),
        (
            "adapters",
            result.adapters,
            f"{clients}{result.adapter:,} parameters, gradients, {training.optimizer}",
        ),
        (
            "training pass",
            result.training,
            f"{clients}{result.batch} examples of {result.length:,} tokens",
        ),
        ("evaluation pass", result.evaluation, f"{result.evaluation_batch} examples"),
        ("peak", result.total, "the larger of the two passes counts"),
        ("on the wire", result.wire, "each adapter that a client receives or returns"),
    ]
    console = Console(highlight=False)
    console.print(printable(f"{backbone.model} on {kind}"), markup=False)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, size, about in rows:
        table.add_row(name, size_text(size), printable(about))
    console.print(table)
    if result.evaluation > 2 * result.training:
        console.print("a smaller evaluation.batch_size reduces the peak", markup=False)


def size_text(size: int) -> str:
    """Return a number of bytes as text, in GB (10⁹) or MB (10⁶)."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"

"""``fedmerge personalize``: an adapter for a client that was not in the federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import app

if TYPE_CHECKING:
    from rich.table import Table

    from fedmerge_peft.serving.personalize import Personalized


@app.command()
def personalize(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run directory of a strategy that merges, such as fedmerge."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="The new client's examples: csv, json, jsonl or parquet, with the columns of the run's task."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A new folder for the adapter. Default: RUN/personalized/NAME."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the new client. Default: the file's.")
    ] = None,
    best: Annotated[
        bool,
        typer.Option("--best", help="Take the adapters of the best round instead of the last."),
    ] = False,
    test_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.99,
            help="Part of the examples set aside for testing, unless the file has the recipe's split column.",
        ),
    ] = 0.3,
    max_train: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most examples to learn from. Default: all that are not for testing."
        ),
    ] = None,
    local: Annotated[
        bool,
        typer.Option(
            "--local/--no-local", help="Train an adapter from scratch too, for comparison."
        ),
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Decides which examples are for testing. Default: the run's."),
    ] = None,
) -> None:
    """Give a new client its own mix of a finished run's adapters.

    Only the merging weights are learned, on the client's few examples; the adapters stay as they are. Beside the result stand the
    choices it should be weighed against.

    Example: fedmerge personalize runs/quickstart --data clinic.csv
    """
    from rich.console import Console

    from fedmerge_peft.api import Run
    from fedmerge_peft.errors import RunError
    from fedmerge_peft.serving.personalize import personalize
    from fedmerge_peft.util.logs import configure_logging
    from fedmerge_peft.util.text import printable

    opened = Run.open(run)
    called = name if name is not None else data.stem
    if out is None and Path(called).name != called:
        raise RunError(
            f"{called!r} is no name for a folder; give another --name, or a folder with --out"
        )
    folder = out if out is not None else run / "personalized" / called
    Run.check_free(folder)
    console = Console(highlight=False)
    configure_logging(Console(stderr=True, highlight=False))
    result = personalize(
        opened,
        data,
        name=called,
        best=best,
        test_fraction=test_fraction,
        max_train=max_train,
        local=local,
        seed=seed,
    )
    result.save(folder)
    console.print(_table(result))
    weights = "  ".join(
        f"{number}: {weight:.2f}" for number, weight in enumerate(result.weights.tolist())
    )
    console.print(
        f"weights of the adapters   {weights}\nmost like client   {printable(str(result.nearest))}",
        markup=False,
    )
    console.print(f"adapter   {printable(str(folder))}\n\nnext:", soft_wrap=True, markup=False)
    command, model = (
        f"PeftModel.from_pretrained(model, {str(folder)!r})",
        opened.recipe.backbone.model,
    )
    console.print(
        printable(f"  {command}   # in Python, with {model} for the model"),
        soft_wrap=True,
        markup=False,
    )


def _table(result: Personalized) -> Table:
    """Every method's losses, metrics and seconds, the best of each in bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fedmerge_peft.tasks.metrics import greater_is_better
    from fedmerge_peft.util.text import printable

    title = f"{result.name}: {result.examples['train']} examples learned from, {result.examples['test']} tested on"
    table = Table(title=Text(printable(title)), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("method")
    metrics = [("training loss", False, [method.train_loss for method in result.methods])]
    for metric in result.methods[0].test:
        metrics.append(
            (
                f"test {metric}",
                greater_is_better(metric),
                [method.test[metric] for method in result.methods],
            )
        )
    for heading, _, _ in metrics:
        table.add_column(heading.replace("_", " "), justify="right")
    table.add_column("seconds", justify="right")
    for row, method in enumerate(result.methods):
        numbers = []
        for _, greater, values in metrics:
            best = (max if greater else min)(values)
            numbers.append(Text(f"{values[row]:.3f}", style="bold" if values[row] == best else ""))
        detail = f" ({method.detail})" if method.detail else ""
        table.add_row(Text(printable(method.name + detail)), *numbers, f"{method.seconds:.1f}")
    return table

"""``fedmerge personalize``: merge an adapter for a client outside the federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import TrustRemoteCode, app

if TYPE_CHECKING:
    from rich.table import Table

    from fedmerge_peft.serving.personalized import Personalized


@app.command()
def personalize(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run directory of a merging strategy, such as fedmerge."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="The new client's examples, with the run's columns: a csv, tsv, json, jsonl, "
            "parquet or arrow file, or a folder."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A new folder for the adapter. Default: RUN/personalized/NAME."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the new client. Default: the file's name without its suffix."),
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="Use the round with the lowest validation loss. Default: the round that the "
            "recipe's evaluation.serve selects.",
        ),
    ] = False,
    test_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.99,
            help="Fraction held out for testing; ignored if the data have the recipe's split "
            "column or several splits.",
        ),
    ] = 0.3,
    max_train: Annotated[
        int | None,
        typer.Option(min=1, help="Limit on training examples. Default: all that are not held out."),
    ] = None,
    local: Annotated[
        bool,
        typer.Option(
            "--local/--no-local", help="Also train an adapter from scratch, for comparison."
        ),
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the held-out examples and of local training. Default: the run's."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge a finished run's adapters for a new client.

    Only the merging weights are learned, on the client's own examples; the adapters are fixed. The
    result is compared with alternatives.

    Example: fedmerge personalize runs/quickstart --data clinic.csv
    """
    from rich.console import Console

    from fedmerge_peft.api import Run
    from fedmerge_peft.errors import RunError
    from fedmerge_peft.serving.personalize import personalize
    from fedmerge_peft.util.logs import configure_logging
    from fedmerge_peft.util.text import printable

    opened = Run.open(run, trust_remote_code=trust_remote_code)
    client = name if name is not None else data.stem
    if out is None and Path(client).name != client:
        raise RunError(
            f"{client!r} is not a valid folder name; give another --name, or a folder with --out"
        )
    folder = out if out is not None else run / "personalized" / client
    Run.check_free(folder)
    console = Console(highlight=False)
    configure_logging(Console(stderr=True, highlight=False))
    result = personalize(
        opened,
        data,
        name=client,
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
        f"merging weights    {weights}\nnearest client     {printable(str(result.nearest))}",
        markup=False,
    )
    console.print(
        f"adapter folder     {printable(str(folder))}\n\nnext:", soft_wrap=True, markup=False
    )
    command = f"PeftModel.from_pretrained(model, {str(folder)!r})"
    console.print(
        printable(f"  {command}   # in Python; model is {opened.recipe.backbone.model}"),
        soft_wrap=True,
        markup=False,
    )


def _table(result: Personalized) -> Table:
    """Return a table with each method's training loss, test metrics and seconds.

    The lowest loss and the best value of each metric are bold.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fedmerge_peft.tasks.metrics import greater_is_better
    from fedmerge_peft.util.text import count_of, printable

    train, test = result.examples["train"], result.examples["test"]
    examples = f"{count_of(train, 'training example')}, {count_of(test, 'test example')}"
    title = f"{result.name}: {examples}"
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

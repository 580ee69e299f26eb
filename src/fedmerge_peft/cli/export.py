"""``fedmerge export``: adapters to take away."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import app


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    client: Annotated[str | None, typer.Option(help="The client whose adapter to export.")] = None,
    all_clients: Annotated[
        bool, typer.Option("--all", help="Every client's adapter, a folder each.")
    ] = False,
    soup: Annotated[
        bool,
        typer.Option(
            "--soup",
            help="The shared adapters, and every client's weights to merge them by on load.",
        ),
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--to", "--out", help="A new folder. Default: RUN/exported/NAME.")
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best", help="Take the round with the lowest validation loss instead of the last."
        ),
    ] = False,
    base_model_id: Annotated[
        str | None,
        typer.Option(
            help="The base model as others know it. Default: the recipe's backbone.model."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Upload to this model repository of the Hugging Face hub too."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="What a new repository is.")
    ] = True,
) -> None:
    """Write adapters as plain PEFT folders with model cards.

    They load with peft and transformers alone; the card's README.md has the lines to type.

    Example: fedmerge export runs/first --client "Fen Water" --to fen-water
    """
    import sys
    from functools import partial

    from fedmerge_peft.api import Run
    from fedmerge_peft.errors import RunError

    if sum([client is not None, all_clients, soup]) != 1:
        raise RunError("give one of --client NAME, --all and --soup: what should be exported?")

    from fedmerge_peft.serving.export import (
        base_model,
        check_repo,
        export_all,
        export_client,
        export_soup,
        folder_name,
        push_to_hub,
        vllm_support,
    )
    from fedmerge_peft.util.text import printable

    opened = Run.open(run)
    base, hub = base_model(opened, base_model_id)
    if push is not None:
        check_repo(push)
        if hub is None:
            raise RunError(
                f"{base} is not on the hub, so nobody could load what is pushed; say which model it is with --base-model-id"
            )
    folder = (
        to
        if to is not None
        else run
        / "exported"
        / (folder_name(client) if client is not None else "all" if all_clients else "soup")
    )
    write = (
        partial(export_client, client=client)
        if client is not None
        else export_all
        if all_clients
        else export_soup
    )
    written = write(opened, folder=folder, best=best, base_model_id=base_model_id, repo=push)
    print(printable(f"wrote {written}, after round {opened.round(best=best)}"))
    print(printable(vllm_support(opened)))
    if hub is None:
        print(
            printable(
                f"the base model {base} is not on the hub; name it for others with --base-model-id"
            ),
            file=sys.stderr,
        )
    if push is not None:
        print(f"pushed: {push_to_hub(written, push, private=private)}")
    else:
        card = written / (
            "README.md" if not all_clients else f"{folder_name(opened.client_names[0])}/README.md"
        )
        print("\nnext:")
        print(
            printable(
                f"  cat {shlex.quote(str(card))}   # the lines that load it, with peft and transformers alone"
            )
        )

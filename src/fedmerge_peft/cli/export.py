"""``fedmerge export``: write adapters as PEFT folders, and push them to the hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import TrustRemoteCode, app


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    client: Annotated[str | None, typer.Option(help="Export the adapter of this client.")] = None,
    all_clients: Annotated[
        bool,
        typer.Option("--all", help="Export the adapters of all clients, one folder per client."),
    ] = False,
    soup: Annotated[
        bool,
        typer.Option(
            "--soup",
            help="Export the shared adapters and all merging weights, with code that merges them.",
        ),
    ] = False,
    vllm: Annotated[
        bool,
        typer.Option(
            "--vllm", help="With --all, also write serve.sh, which serves all clients with vLLM."
        ),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            "--out",
            help="A new folder. Default: RUN/exported/NAME, with the client's name, all or soup as "
            "NAME.",
        ),
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="Use the round with the lowest validation loss. Default: the round that the "
            "recipe's evaluation.serve selects.",
        ),
    ] = False,
    base_model_id: Annotated[
        str | None,
        typer.Option(help="Public name of the base model. Default: the recipe's backbone.model."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Also upload to this model repository on the Hugging Face hub."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a new repository.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write adapters as plain PEFT folders with model cards.

    The folders load with peft and transformers only; each README.md has example code.

    Example: fedmerge export runs/first --client "Fen Water" --to fen-water
    """
    import sys
    from functools import partial

    from fedmerge_peft.api import Run
    from fedmerge_peft.errors import RunError

    if sum([client is not None, all_clients, soup]) != 1:
        raise RunError("choose what to export: give exactly one of --client NAME, --all and --soup")

    if vllm and not all_clients:
        raise RunError("--vllm serves all clients; give it together with --all")

    from fedmerge_peft.serving.export import (
        check_repo,
        export_all,
        export_client,
        export_soup,
        folder_name,
        push_to_hub,
    )
    from fedmerge_peft.serving.model_card import base_model
    from fedmerge_peft.serving.vllm import vllm_support
    from fedmerge_peft.util.text import printable

    opened = Run.open(run, trust_remote_code=trust_remote_code)
    base, hub = base_model(opened, base_model_id)
    if push is not None:
        check_repo(push)
        if hub is None:
            raise RunError(
                f"the base model {base} is not on the hub, so a pushed adapter could not be "
                "loaded; if the model has a public name, give it with --base-model-id"
            )
    if client is not None:
        write, name = partial(export_client, client=client), folder_name(client)
    elif all_clients:
        write, name = partial(export_all, vllm=vllm), "all"
    else:
        write, name = partial(export_soup), "soup"
    folder = to if to is not None else run / "exported" / name
    written = write(opened, folder=folder, best=best, base_model_id=base_model_id, repo=push)
    print(printable(f"wrote {written}, the state after round {opened.round(best=best)}"))
    print(printable(vllm_support(opened)))
    if hub is None:
        print(
            printable(
                f"the base model {base} is not on the hub; if it has a public name, give it with "
                "--base-model-id"
            ),
            file=sys.stderr,
        )
    if push is not None:
        print(f"pushed: {push_to_hub(written, push, private=private)}")
    else:
        subfolder = folder_name(opened.client_names[0]) if all_clients else "."
        card = shlex.quote(str(written / subfolder / "README.md"))
        print("\nnext:")
        if vllm:
            print(printable(f"  sh {shlex.quote(str(written / 'serve.sh'))}   # vLLM's server"))
        print(printable(f"  cat {card}   # code to load it with peft and transformers only"))

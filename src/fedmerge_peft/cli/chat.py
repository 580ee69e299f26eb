"""``fedmerge chat``: a chat with a client's adapter in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import TrustRemoteCode, app


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    client: Annotated[str, typer.Option(help="The client whose adapter answers.")],
    system: Annotated[
        str | None,
        typer.Option(help="System prompt. Default: the recipe's, or the chat template's."),
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="Use the round with the lowest validation loss. Default: the round that the "
            "recipe's evaluation.serve selects.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto (a CUDA GPU if available, else the CPU), cpu, mps or cuda.")
    ] = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of sampled answers (task.do_sample).")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a client's adapter. Each line is a message; answers appear as they are generated.

    /restart begins a new chat. /exit, Ctrl-D or the end of the input ends the chat.

    Example: fedmerge chat runs/assistants --client clinic
    """
    import sys

    import torch

    from fedmerge_peft.runs.directory import RunDirectory
    from fedmerge_peft.serving.conversation import Conversation
    from fedmerge_peft.util.text import printable

    opened = RunDirectory.open(run, trust_remote_code=trust_remote_code)
    conversation = Conversation(opened, client, system=system, best=best, device=device)
    if seed is not None:
        torch.manual_seed(seed)

    def write(part: str) -> None:
        sys.stdout.write("\n".join(map(printable, part.split("\n"))))
        sys.stdout.flush()

    for line in _lines("you: "):
        if line == "/exit":
            break
        if line == "/restart":
            conversation.restart()
        elif line:
            if sys.stdin.isatty():
                write(f"{client}: ")
            conversation.ask(line, write)
            print()


def _lines(prompt: str) -> Iterator[str]:
    """Yield the stripped lines of standard input. In a terminal, prompt for each line."""
    import sys

    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401 (arrow keys and history in input)

    try:
        while True:
            yield input(prompt).strip()
    except EOFError:
        print()

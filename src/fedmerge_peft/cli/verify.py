"""``fedmerge verify``: compare runs and exports with their checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmerge_peft.cli.app import app


@app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Run directories or exported folders.")
    ],
) -> None:
    """Compare the files of runs or exports with their SHA-256 sums.

    If files of a PATH are damaged, missing or unknown, each of them is listed, later PATHs are not
    checked, and the exit code is 2. Files of experiment trackers are not checked. The sums detect
    accidental changes; they do not prove who wrote a file.

    Example: fedmerge verify runs/first
    """
    from fedmerge_peft.runs.verify import verify
    from fedmerge_peft.util.text import printable

    for path in paths:
        print(printable(f"{path}: all {verify(path)} files agree with their SHA-256 sums"))

"""``fedmerge doctor``: what of the installation works here."""

from __future__ import annotations

import typer

from fedmerge_peft.cli.app import app

_MARKS = {"ok": "ok", "absent": "--", "wrong": "!!"}


@app.command()
def doctor() -> None:
    """Look at versions, devices, hub, extras and disk.

    Marks: ok; -- one can do without it; !! should be mended, and the exit code is 1.

    Example: fedmerge doctor
    """
    from fedmerge_peft.cli.installation import findings
    from fedmerge_peft.util.text import printable

    wrong = 0
    for finding in findings():
        wrong += finding.state == "wrong"
        remedy = f"   # {finding.do}" if finding.do else ""
        print(
            printable(f"{_MARKS[finding.state]}  {finding.what:<24}{finding.says}{remedy}"),
            flush=True,
        )
    if wrong:
        raise typer.Exit(1)

"""``fedmerge doctor``: check the installation."""

from __future__ import annotations

import typer

from fedmerge_peft.cli.app import app

_MARKS = {"ok": "ok", "optional": "--", "failed": "!!"}


@app.command()
def doctor() -> None:
    """Check versions, devices, hub access, extras and disk space.

    Marks: ok; -- missing or limited, but not required; !! a problem, which sets exit code 1.

    Example: fedmerge doctor
    """
    from fedmerge_peft.cli.installation import run_checks
    from fedmerge_peft.util.text import printable

    failed = 0
    for check in run_checks():
        failed += check.state == "failed"
        remedy = f"   # {check.remedy}" if check.remedy else ""
        print(
            printable(f"{_MARKS[check.state]}  {check.name:<24}{check.result}{remedy}"), flush=True
        )
    if failed:
        raise typer.Exit(1)

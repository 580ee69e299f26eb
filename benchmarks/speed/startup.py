"""Row f: what a command takes before it does anything, against the interpreter importing torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

from timing import Row, race, seconds

_CALL = "from fedmerge_peft.cli import main; main({!r})"
COMMANDS = {"--help": ("≤ 0.4 s", ["--help"]), "ls": ("", ["ls"]), "validate": ("≤ 0.8 s", ["validate", "quickstart"])}


def rows() -> Iterator[Row]:
    """f. Start-up: commands that load no model, against `python -c "import torch"`."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    taken = race(
        {"python": run(""), "import torch": run("import torch"), **{name: run(_CALL.format(call)) for name, (_, call) in COMMANDS.items()}},
        7,
    )
    for name, (wanted, _) in COMMANDS.items():
        ratios = [torch / ours for torch, ours in zip(taken["import torch"], taken[name], strict=True)]
        sides = ", ".join(f"{each} {seconds(median(taken[each]))}" for each in (name, "import torch", "python"))
        yield Row(f"f. `fedmerge {name}`", median(ratios), min(ratios), max(ratios), sides, wanted)

"""The command line: one module per group of commands; each adds its commands to ``app``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from fedmerge_peft.cli.exit_codes import errors_as_messages


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fedmerge`` and exit with one of the codes in ``exit_codes``.

    Args:
        arguments: Arguments after the program's name. Default: those of this process.
    """
    # Idle OpenMP threads sleep instead of spinning. torch reads this variable at its first import.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None if a shell closed it with >&-
            # Lines appear immediately, even in pipes and files.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    with errors_as_messages():
        from fedmerge_peft.cli import (  # noqa: F401 (each import adds its commands)
            chat,
            compare,
            data,
            doctor,
            estimate,
            export,
            federate,
            init,
            personalize,
            recipes,
            report,
            run,
            scores,
            sweep,
            verify,
        )
        from fedmerge_peft.cli.app import app

        app(arguments, prog_name="fedmerge")

"""The command line: one file a verb family, each adding its verbs to ``app``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from fedmerge_peft.distributed import rank, wait_for_launcher
from fedmerge_peft.errors import FedMergeError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fedmerge`` and exit: 0 when all went well, 2 with one message for errors raised on purpose.

    130 and 143 say that SIGINT (Ctrl-C) or SIGTERM stopped it.

    With ``FEDMERGE_TRACEBACK=1`` in the environment such errors keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # it is None where a shell closed it with >&-
            stream.reconfigure(errors="backslashreplace")
    try:
        from fedmerge_peft.cli import (  # noqa: F401 - importing adds their verbs
            compare,
            data,
            doctor,
            export,
            federate,
            personalize,
            recipes,
            report,
            run,
            sweep,
        )
        from fedmerge_peft.cli.app import app

        try:
            app(arguments, prog_name="fedmerge")
        finally:
            if isinstance(sys.stdout, TextIOWrapper):
                sys.stdout.flush()
    except FedMergeError as error:
        if os.environ.get("FEDMERGE_TRACEBACK") == "1":
            raise
        if error.rank == rank():
            print(
                _harmless("\n".join([str(error), *getattr(error, "__notes__", [])])),
                file=sys.stderr,
                flush=True,
            )
        else:
            wait_for_launcher()
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter would complain at its end
        sys.exit(1)


def _harmless(text: str) -> str:
    """The text as a terminal can show it: file and column names may hold characters that steer one."""
    from fedmerge_peft.util.text import printable

    return "\n".join(map(printable, text.split("\n")))

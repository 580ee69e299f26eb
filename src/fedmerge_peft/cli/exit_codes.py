"""Exit codes of the program, and errors as one message."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from fedmerge_peft.distributed import rank
from fedmerge_peft.errors import FedMergeError


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print a ``FedMergeError`` that the block raises as one message, and exit with code 2.

    On several ranks, only the lowest rank that failed prints the message. With
    ``FEDMERGE_TRACEBACK=1`` in the environment, the error is raised instead. Ctrl-C exits with code
    130, and a closed pipe with code 1. Other exceptions are raised.

    Commands themselves exit with code 1 after a failed check, and with code 143 after SIGTERM.
    """
    try:
        try:
            yield
        finally:
            if isinstance(sys.stdout, TextIOWrapper):  # None if a shell closed it with >&-
                sys.stdout.flush()
    except FedMergeError as error:
        if os.environ.get("FEDMERGE_TRACEBACK") == "1":
            raise
        if error.rank == rank():
            from fedmerge_peft.util.text import printable_lines

            text = "\n".join([str(error), *getattr(error, "__notes__", [])])
            print(printable_lines(text), file=sys.stderr, flush=True)
        else:
            # The launcher ends all ranks when one exits. Give the failed rank time to print.
            time.sleep(5)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        # Otherwise the interpreter would report an error when it flushes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

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
    """Print an error of the block as one message, and exit with its code.

    Exit codes: 0 success; 1 a failed check or a closed pipe; 2 an error, reported as one message;
    130 and 143 stopped by SIGINT (Ctrl-C) or SIGTERM. With ``FEDMERGE_TRACEBACK=1`` in the
    environment, errors keep their traceback.
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
            # The launcher ends all ranks when one exits: leave the other time to print its error.
            time.sleep(5)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        # Otherwise the interpreter would report an error when it flushes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

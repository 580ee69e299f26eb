"""Convert errors of other libraries to errors of this package, with a reason of one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedmerge_peft.errors import FedMergeError

_OBJECT = re.compile(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>")
"""Python's default description of an object, with its address in memory."""
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Requests to stop, which are not errors of a library."""


@contextmanager
def library_errors(describe: Callable[[str], FedMergeError]) -> Iterator[None]:
    """Convert every exception that is raised inside the context to ``describe(reason)``.

    Libraries document few of the errors that they raise, and Rust code raises panics that are not
    even an ``Exception``. Errors of this package and requests to stop pass unchanged.

    Args:
        describe: Function that returns the error for a reason of one line.
    """
    try:
        yield
    except (*STOPS, FedMergeError):
        raise
    except BaseException as error:
        raise describe(reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, without a final period.

    A line that ends with a colon is joined with the next one. The messages of most builtin errors
    are unclear without the type, so it precedes them, except for ``OSError`` and ``ValueError``. If
    there is no message, the type is the reason.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    # The messages of a library's own errors, OSError and ValueError are clear without the type.
    is_clear = type(error).__module__ != "builtins" or isinstance(error, OSError | ValueError)
    line = _OBJECT.sub("", " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")
    return line if is_clear else f"{kind}: {line}"

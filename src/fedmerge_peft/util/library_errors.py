"""Errors of other libraries as errors of this package, with one line and a place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedmerge_peft.errors import FedMergeError

_OBJECT = re.compile(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>")
"""Objects as Python names those without a name of their own."""
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Requests to stop, which are no errors of a library."""


@contextmanager
def library_errors(describe: Callable[[str], FedMergeError]) -> Iterator[None]:
    """Raise ``describe(reason)`` for whatever the calls inside raise.

    Libraries document few of the errors that they raise, and Rust code raises panics that are not
    even an ``Exception``. Errors of this package and requests to stop pass unchanged.

    Args:
        describe: Makes the error from the reason, one line.
    """
    try:
        yield
    except (*STOPS, FedMergeError):
        raise
    except BaseException as error:
        raise describe(reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, with its type if it is a builtin one."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if not lines:
        return kind
    # Libraries name the types of their own errors after what the message says.
    telling = type(error).__module__ != "builtins" or isinstance(error, OSError | ValueError)
    line = _OBJECT.sub("", lines[0])
    return line if telling else f"{kind}: {line}"

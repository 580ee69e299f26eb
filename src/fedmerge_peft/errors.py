"""Every error this package raises on purpose.

    FedMergeError
    ├── RecipeError        the recipe asks for something that does not exist or cannot be
    ├── DataError          the data are absent, or are not what the recipe says
    ├── BackboneError      the model is absent, or cannot carry the adapter that was asked for
    ├── DeviceError        the device or the precision asked for is not there
    ├── RunError           a run directory is missing, unreadable or not ours
    │   ├── RunExistsError the run directory already holds a run
    │   ├── RunBusyError   another process is writing the run directory
    │   ├── ResumeError    the run cannot go on from where it stopped
    │   └── SweepError     some recipes of a sweep failed, the others ran
    ├── FederateError      a federation across sites cannot begin or go on
    │   ├── RefusedError   a site does not do what the federation asks of it
    │   └── WireError      a message between server and site is not what was agreed
    ├── ClientError        a client failed; raised from the original, names client and round
    ├── TooFewClientsError too few clients of a round replied well
    └── RankError          another of the ranks that train together failed, or is gone

The command line prints them as one message on standard error and exits with code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class FedMergeError(Exception):
    """Base of all errors raised on purpose; its text says what, where and what next."""

    rank: int = 0
    """Of the ranks that raise it, the one that says so."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[FedMergeError], args: tuple[Any, ...], held: dict[str, Any]) -> FedMergeError:
    """An error in another process; its initialiser takes other arguments than the text."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(held)
    return error


class RecipeError(FedMergeError):
    """One or more faults in a recipe, one a line, each as ``file:line: dotted.path: fault``."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class DataError(FedMergeError):
    """Data that are absent, unreadable, or do not fit what the recipe says about them."""


class BackboneError(FedMergeError):
    """A model that cannot be loaded, or cannot carry the adapter that the recipe asks for."""


class DeviceError(FedMergeError):
    """A device or numeric precision that this machine does not have."""


class RunError(FedMergeError):
    """A run directory that is missing, unreadable, or was not written by this package."""


class RunExistsError(RunError):
    """The run directory already holds a run, or other files; nothing in it was touched. ``free`` is a directory to use instead."""

    def __init__(self, message: str, free: Path) -> None:
        self.free = free
        super().__init__(message)


class RunBusyError(RunError):
    """Another process is writing the run directory; it was not touched."""


class ResumeError(RunError):
    """A run that cannot go on: it has ended, its checkpoints are damaged, or data or recipe are not what they were."""


class SweepError(RunError):
    """Some recipes of a sweep failed, after all of them were tried. ``failures`` has the reasons by name."""

    def __init__(self, failures: dict[str, str]) -> None:
        self.failures = failures
        lines = (f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(
            "\n".join(
                [f"{len(failures)} run{'s' * (len(failures) > 1)} of the sweep failed:", *lines]
            )
        )


class FederateError(FedMergeError):
    """A federation across sites that cannot begin or go on: a kit, a connection, a site's settings, or all of its sites are at fault."""


class RefusedError(FederateError):
    """A site does not do what it is asked, as its own settings do not allow it; nothing left the site."""


class WireError(FederateError):
    """A message between server and site that is not what was agreed: its form, its layout, its number format."""


class ClientError(FedMergeError):
    """A client's work failed. Raised from the original error; names the client and the round."""

    def __init__(self, client: str, round: int, cause: str) -> None:
        self.client, self.round, self.cause = client, round, cause
        super().__init__(f"client {client}, round {round}: {cause}")


class TooFewClientsError(FedMergeError):
    """Fewer clients of a round replied well than ``clients.min_clients``. The round changed nothing; the rounds before it stand."""


class RankError(FedMergeError):
    """Another of the processes that train together (``distributed.py``) failed in a way nobody meant, or has ended."""

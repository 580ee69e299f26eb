"""Errors that this package raises on purpose.

    FedMergeError
    ├── RecipeError        the recipe has invalid or contradictory settings
    ├── PluginError        a plugin cannot be imported, fails, or violates its interface
    ├── DataError          the data are missing, or do not match the recipe
    ├── BackboneError      the model cannot be loaded or used, or does not suit the recipe
    ├── DeviceError        the device, the precision or the number of processes is not available
    ├── RunError           a run cannot be read or written, or does not have what is requested
    │   ├── RunExistsError the directory already contains a run or other files
    │   ├── RunBusyError   another process is writing the run directory
    │   ├── ResumeError    the run cannot be resumed
    │   └── SweepError     some recipes of a sweep failed
    ├── FederateError      a federation across sites cannot start or continue
    │   ├── RefusedError   a site's settings or the recipe in its kit forbid a request
    │   └── WireError      a message is malformed or does not fit the federation
    ├── ClientError        a client failed; names client and round
    ├── TooFewClientsError too few clients of a round sent valid replies
    ├── DivergedError      an update would make the soup or the weights infinite, NaN or too large
    └── RankError          another rank of a distributed run failed or exited

The command line prints an error as one message on standard error and exits with code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class FedMergeError(Exception):
    """Base class. The message names the problem, its location and a remedy."""

    rank: int = 0
    """The lowest failed rank. Only this rank reports the error if several ranks raise it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[FedMergeError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> FedMergeError:
    """Unpickle an error without its initializer, whose parameters differ from ``args``."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class RecipeError(FedMergeError):
    """Recipe with one or more faults.

    ``faults`` lists them, and the message has one line for each. A fault that is found when a file
    is read has the form ``file:line: dotted.path: fault``.
    """

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class PluginError(FedMergeError):
    """Plugin that cannot be imported, or a part of one that fails or violates its interface."""


class DataError(FedMergeError):
    """Data that are missing, unreadable, or do not match the recipe."""


class BackboneError(FedMergeError):
    """Model, tokenizer or processor that cannot be loaded or used, or does not suit the recipe."""


class DeviceError(FedMergeError):
    """Device, numeric precision or number of processes that is not available."""


class RunError(FedMergeError):
    """Run, or file made from a run, that cannot be read or written, or lacks what is requested."""


class RunExistsError(RunError):
    """Run directory that already contains a run or other files. The directory is unchanged.

    ``free`` is an unused directory.
    """

    def __init__(self, message: str, free: Path) -> None:
        self.free = free
        super().__init__(message)


class RunBusyError(RunError):
    """Run directory that another process is writing. The directory is unchanged."""


class ResumeError(RunError):
    """Run that cannot be resumed.

    The run is complete, its checkpoints are damaged, or its data, model or recipe have changed or
    are missing.
    """


class SweepError(RunError):
    """Sweep with failed recipes. All recipes were tried.

    ``failures`` maps names of recipes to reasons.
    """

    def __init__(self, failures: dict[str, str]) -> None:
        self.failures = failures
        lines = (f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(
            "\n".join(
                [f"{len(failures)} run{'s' * (len(failures) > 1)} of the sweep failed:", *lines]
            )
        )


class FederateError(FedMergeError):
    """Federation across sites that cannot start or continue.

    Typical causes are a damaged kit, a lost connection, wrong settings or data of a site, or the
    failure of all sites.
    """


class RefusedError(FederateError):
    """Request that a site's settings or the recipe in its kit forbid; the site sends no data.

    A site also raises this error at its start if its data or the kit's recipe violate its settings.
    """


class WireError(FederateError):
    """Message between server and site that is malformed or does not fit the federation.

    For example, its adapters have another layout, or it names other clients than at enrollment.
    """


class ClientError(FedMergeError):
    """Failure of a client. The message names the client, the round and ``cause``."""

    def __init__(self, client: str, round: int, cause: str) -> None:
        self.client, self.round, self.cause = client, round, cause
        super().__init__(f"client {client}, round {round}: {cause}")


class TooFewClientsError(FedMergeError):
    """Round with fewer valid replies than ``clients.min_clients``.

    The round has no effect. The results of earlier rounds are kept.
    """


class DivergedError(FedMergeError):
    """Round whose update would leave the soup or the weights infinite, NaN or too large.

    The round has no effect. The results of earlier rounds are kept.
    """


class RankError(FedMergeError):
    """Unexpected failure or exit of another rank (see ``distributed.py``)."""

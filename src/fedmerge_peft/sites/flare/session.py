"""The operator's session with the server; FLARE's exceptions become errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import OPERATOR, FederationFile
from fedmerge_peft.sites.flare.configuration import search_only_own_files
from fedmerge_peft.sites.flare.operator_files import restrict_file_commands
from fedmerge_peft.util.library_errors import reason_of

_LOST = (api_spec.NoConnection, api_spec.SessionClosed)
_REFUSED = (
    api_spec.AuthenticationError,
    api_spec.AuthorizationError,
    api_spec.ClientsStillRunning,
    api_spec.CommandError,
    api_spec.InternalError,
    api_spec.InvalidArgumentError,
    api_spec.InvalidJobDefinition,
    api_spec.InvalidTarget,
    api_spec.JobNotDone,
    api_spec.JobNotFound,
    api_spec.JobNotRunning,
    api_spec.JobTimeout,
    api_spec.NoClientsAvailable,
    api_spec.NoReply,
    RuntimeError,  # any other status of a reply
)
"""Exceptions of FLARE's client for refused requests; they have no common base class."""


class ServerUnreachableError(FederateError):
    """The server does not respond."""


class ConnectionLostError(FederateError):
    """The server stopped responding, or was restarted."""


@contextmanager
def open_session(kit: Path, timeout: float = 10.0) -> Iterator[Session]:
    """Connect to the server as the operator; close the session at the end of the block.

    Raises:
        ServerUnreachableError: No server of the federation responds.
        ConnectionLostError: The server stopped responding within the block, or was restarted.
        FederateError: The server refused a request of the block, or the folder is not a kit.
    """
    federation = FederationFile.read(kit)
    restrict_file_commands()
    search_only_own_files()
    address = f"{federation.host}:{federation.port}"
    with no_output():
        try:
            session = new_secure_session(
                OPERATOR, str(kit.resolve()), timeout=timeout, auto_login_max_tries=2
            )
        except Exception as error:
            raise ServerUnreachableError(
                f"{address}: no server of this federation responds "
                f"({reason_of(error)}); start it with: fedmerge federate server DIR"
            ) from error
    try:
        yield session
    except _LOST as error:
        raise ConnectionLostError(
            f"{address}: the server stopped responding ({reason_of(error)})"
        ) from error
    except _REFUSED as error:
        raise FederateError(
            f"{address}: the server refused a request: {reason_of(error)}; "
            "see log.txt in the server's kit"
        ) from error
    finally:
        with no_output():
            session.close()


@contextmanager
def no_output() -> Iterator[None]:
    """Discard the output of FLARE's client within a block."""
    with redirect_stdout(StringIO()):
        yield

"""Unix sockets between the NVIDIA FLARE processes of one machine.

By default, FLARE's main process accepts its jobs on a TCP port of the loopback interface, without
authentication. Whatever arrives there is passed to the same handlers as the server's messages. This
module replaces the port by a Unix socket in a folder of mode 0700, which only the folder's owner
can open.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

from nvflare.fuel.f3.communicator import driver_mgr
from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.drivers.socket_conn import ConnectionHandler, SocketConnection

from fedmerge_peft.sites.config import SOCKETS_VARIABLE

SCHEME = "unix"
_SCHEME_VARIABLE = "NVFLARE_INTERNAL_CONN_SCHEME"
"""FLARE's environment variable with the URL scheme of connections between main process and jobs."""


def use_local_sockets() -> None:
    """Use Unix sockets between this process and the other FLARE processes of the machine.

    Each of these processes must call the function before FLARE creates its first cell. The
    environment variable ``FEDMERGE_SOCKETS`` names the folder of the sockets.
    """
    os.environ[_SCHEME_VARIABLE] = SCHEME
    if driver_mgr.find_driver_class(SCHEME) is None:
        driver_mgr.register(UnixDriver)


class _Server(ThreadingUnixStreamServer):
    daemon_threads = True
    ssl_context = None
    """Attribute that FLARE's handler reads; None, because a Unix socket has no TLS."""

    def __init__(self, driver: UnixDriver, connector: ConnectorInfo) -> None:
        self.driver, self.connector = driver, connector
        path = Path(connector.params[DriverParams.PATH.value])
        path.unlink(missing_ok=True)
        super().__init__(str(path), ConnectionHandler)
        path.chmod(0o600)


class UnixDriver(BaseDriver):  # type: ignore[misc]
    """FLARE driver for ``unix://local/PATH``."""

    def __init__(self) -> None:
        super().__init__()
        self._server: _Server | None = None

    @staticmethod
    def supported_transports() -> list[str]:
        """Return the scheme of the driver's URLs."""
        return [SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """Return the driver's capabilities: heartbeats, but no TLS, which it does not need."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: False}

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """Return the URL of a new socket twice: for the connecting and for the listening side.

        Raises:
            KeyError: ``FEDMERGE_SOCKETS`` is not set.
            PermissionError: The folder belongs to another user, or other users may open it.
        """
        folder = Path(os.environ[SOCKETS_VARIABLE])
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(
                f"{folder}: other users may open this folder; it must belong to the user who "
                "runs this process, and have mode 0700"
            )
        url = f"{SCHEME}://local{folder / secrets.token_hex(4)}"
        return url, url

    def listen(self, connector: ConnectorInfo) -> None:
        """Accept connections until ``shutdown``."""
        self.connector = connector
        self._server = _Server(self, connector)
        self._server.serve_forever()

    def connect(self, connector: ConnectorInfo) -> None:
        """Connect, and read frames until the connection is closed."""
        self.connector = connector
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(connector.params[DriverParams.PATH.value])
        connection = SocketConnection(channel, connector)
        self.add_connection(connection)
        connection.read_loop()
        self.close_connection(connection)

    def shutdown(self) -> None:
        """Close the connections and stop listening."""
        self.close_all()
        if self._server is not None:
            self._server.shutdown()

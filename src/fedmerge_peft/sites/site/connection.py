"""Local socket between a site's job process and its trainer; only the site's user can open it.

A request consists of a message's kind and the message. A reply consists of a status byte and, if
the status is ``_REPLY``, a message. Each connection carries one request. A job that stops waiting
closes its connection, so no later request receives an old reply. This module imports neither torch
nor nvflare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Protocol

from fedmerge_peft.errors import FederateError

log = logging.getLogger(__name__)

_REPLY, _NOT_OPEN = b"=", b"?"
"""Status of a reply: a message follows, or the trainer has not loaded the model yet."""
_POLL_INTERVAL = 0.1
"""Seconds between two checks whether a wait is canceled, or between two attempts to connect."""


class MessageHandler(Protocol):
    """Interface of ``trainer.Trainer`` for this module."""

    @property
    def is_open(self) -> bool:
        """True if the handler is ready to train and evaluate."""

    def handle(self, payload: bytes) -> bytes:
        """Return the reply to a message."""


def serve(trainer: MessageHandler, address: str) -> None:
    """Handle requests one after another, and never return."""
    with Listener(address, family="AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                try:
                    kind, payload = connection.recv_bytes(), connection.recv_bytes()
                    if kind not in (b"enroll", b"open") and not trainer.is_open:
                        connection.send_bytes(_NOT_OPEN)
                        continue
                    reply = trainer.handle(payload)
                    connection.send_bytes(_REPLY)
                    connection.send_bytes(reply)
                except (EOFError, OSError) as error:
                    log.warning(
                        "a request got no reply, because the job closed its connection or the "
                        "audit log cannot be written (%s)",
                        str(error) or type(error).__name__,
                    )


class TrainerConnection:
    """A job's end of the socket; it opens a connection for each request.

    It stores the job's ``open`` message, and sends it again to a trainer that was restarted.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._open_payload: bytes | None = None

    def request(self, kind: str, payload: bytes, canceled: Callable[[], bool]) -> bytes:
        """Send a message and return the trainer's reply; wait for a trainer that is starting.

        Args:
            kind: Kind of the message.
            payload: The serialized message.
            canceled: Called regularly; True ends the wait.

        Raises:
            FederateError: The trainer closed the connection without a reply, it cannot load the
                model, or ``canceled`` returned True.
        """
        if kind == "open":
            self._open_payload = payload
        reply = self._request_once(kind, payload, canceled)
        if reply is None and self._open_payload is not None:
            self._request_once("open", self._open_payload, canceled)
            reply = self._request_once(kind, payload, canceled)
        if reply is None:
            raise FederateError(
                "the site's trainer has not loaded the model for this job; see the trainer's output"
            )
        return reply

    def _request_once(
        self, kind: str, payload: bytes, canceled: Callable[[], bool]
    ) -> bytes | None:
        """Send a message and return the reply; return None if the reply has no message."""
        with self._connect(canceled) as connection:
            try:
                connection.send_bytes(kind.encode())
                connection.send_bytes(payload)
                while not connection.poll(_POLL_INTERVAL):
                    if canceled():
                        raise FederateError(
                            "the site's trainer did not reply before the deadline, or before the "
                            "job was stopped"
                        )
                return connection.recv_bytes() if connection.recv_bytes() == _REPLY else None
            except (EOFError, OSError) as error:
                raise FederateError(
                    "the site's trainer died or failed during the request; the site restarts a "
                    "trainer that died, and the trainer's output has the cause"
                ) from error

    def _connect(self, canceled: Callable[[], bool]) -> Connection:
        while True:
            try:
                return Client(self.address, family="AF_UNIX")
            except OSError:  # the trainer is starting or restarting
                if canceled():
                    raise FederateError(
                        "the site's trainer did not start before the deadline, or before the job "
                        "was stopped; see the trainer's output"
                    ) from None
                time.sleep(_POLL_INTERVAL)

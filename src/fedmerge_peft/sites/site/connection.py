"""Between a site's job process and its trainer: bytes over a local socket that only this user can open.

A request is its kind, then a message; the answer is one byte, then a message unless the byte says that there is none. A connection carries
one request, so that a job that gives up closes it and nobody takes an old answer for a new one. Nothing here imports torch or nvflare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Protocol

from fedmerge_peft.errors import FederateError

log = logging.getLogger(__name__)

_DONE, _CLOSED = b"=", b"?"
"""The answer follows; or: the trainer has not been opened for this job."""
_WAIT = 0.1
"""Seconds between two looks."""


class Answers(Protocol):
    """What answers messages: a ``trainer.Trainer``."""

    @property
    def opened(self) -> bool:
        """Whether it can be asked to work."""

    def answer(self, content: bytes) -> bytes:
        """The answer to a message."""


def serve(trainer: Answers, address: str) -> None:
    """Answer requests one after another, for good."""
    with Listener(address, family="AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                try:
                    kind, content = connection.recv_bytes(), connection.recv_bytes()
                    if kind not in (b"enrol", b"open") and not trainer.opened:
                        connection.send_bytes(_CLOSED)
                        continue
                    answer = trainer.answer(content)
                    connection.send_bytes(_DONE)
                    connection.send_bytes(answer)
                except (EOFError, OSError) as error:  # the job has gone, or waits no longer
                    log.warning("an answer was not waited for (%s)", type(error).__name__)


class Link:
    """A job's way to the trainer. It remembers how the job was opened, and opens it again for a trainer that was started anew."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._opening: bytes | None = None

    def ask(self, kind: str, content: bytes, given_up: Callable[[], bool]) -> bytes:
        """The trainer's answer. Waits for a trainer that is still starting, until ``given_up``.

        Raises:
            FederateError: The trainer died over it, or the job gave up.
        """
        if kind == "open":
            self._opening = content
        answer = self._once(kind, content, given_up)
        if answer is None and self._opening is not None:
            self._once("open", self._opening, given_up)
            answer = self._once(kind, content, given_up)
        if answer is None:
            raise FederateError("the trainer could not be opened for this job")
        return answer

    def _once(self, kind: str, content: bytes, given_up: Callable[[], bool]) -> bytes | None:
        """The answer; None of a trainer that has not been opened."""
        with self._connect(given_up) as connection:
            try:
                connection.send_bytes(kind.encode())
                connection.send_bytes(content)
                while not connection.poll(_WAIT):
                    if given_up():
                        raise FederateError("the job waits no longer")
                return connection.recv_bytes() if connection.recv_bytes() == _DONE else None
            except (EOFError, OSError) as error:
                raise FederateError(
                    "the site's trainer died while it worked; it is being started again"
                ) from error

    def _connect(self, given_up: Callable[[], bool]) -> Connection:
        while True:
            try:
                return Client(self.address, family="AF_UNIX")
            except OSError:  # it is not there yet, or not any more
                if given_up():
                    raise FederateError("the site's trainer did not start in time") from None
                time.sleep(_WAIT)

"""Interface of the connection between the server and the sites of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

Request = tuple[int, Callable[[], bytes]]
"""Number of a request, and the function that serializes its message when it is sent."""


class JobStopped(Exception):  # noqa: N818 (a normal end, not an error)
    """Raised when the operator stops the job at once; the current round has no effect."""


class Transport(Protocol):
    """Connection between the server and the sites of a job."""

    @property
    def sites(self) -> Sequence[str]:
        """Names of the connected sites."""

    def send_and_receive(
        self, requests: Mapping[str, Sequence[Request]], deadline: float
    ) -> Iterator[tuple[str, int, bytes | str]]:
        """Send each site its requests, one after another, and yield the replies as they arrive.

        Args:
            requests: The requests of each site.
            deadline: Seconds from now within which every request gets a reply or fails.

        Yields:
            Site, number of the request, and either the bytes of the reply or the reason for its
                absence.

        Raises:
            JobStopped: The operator stopped the job at once.
        """

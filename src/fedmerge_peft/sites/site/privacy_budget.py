"""Privacy budget of a site's clients, kept on disk and charged before each release."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedmerge_peft.errors import FederateError, RefusedError
from fedmerge_peft.sites.config import SITE_FILE, read_json
from fedmerge_peft.util.files import write_json
from fedmerge_peft.util.gaussian_privacy import epsilon_of

BUDGET_FILE = "privacy.json"
_SLACK = 1e-9
"""Relative tolerance for rounding, which depends on the order of a sum."""


@dataclass(frozen=True)
class Spent:
    """Releases of one client so far."""

    updates: int = 0
    """Number of updates with noise; each adapter of a reply counts as one update."""
    mu_squared: float = 0.0
    """Σ_k (2 clip_k / noise_k)² over these updates (``util.gaussian_privacy``)."""


@dataclass(frozen=True)
class PrivacyBudget:
    """``privacy.json`` in the site's kit: the releases of each client, over all jobs and methods.

    The file is replaced atomically, under a lock, before an update is computed. If the process dies
    before it sends the update, the charge remains. No update is sent without a charge.
    """

    kit: Path
    delta: float
    """δ at which ε is computed."""
    epsilon: float | None
    """Largest ε of a client. If it is None, releases are counted but not bounded."""

    def spent(self, client: str) -> Spent:
        """Return a client's releases so far. Raises ``FederateError`` if the file is damaged."""
        return self._read().get(client, Spent())

    def epsilon_spent(self, client: str) -> float:
        """Return the ε of a client's releases so far, at ``delta``.

        Raises ``FederateError`` if the file is damaged.
        """
        return epsilon_of(self.spent(client).mu_squared, self.delta)

    def charge(self, client: str, mu_squared: float, updates: int = 1) -> None:
        """Charge a client's budget for updates, which may leave the site once the function returns.

        Args:
            client: Name of the client.
            mu_squared: μ² of one update.
            updates: Number of updates.

        Raises:
            RefusedError: The budget does not suffice; nothing was charged.
            FederateError: The file is damaged.
            RunError: The file cannot be written; the updates must not be sent.
        """
        with self._locked():
            known = self._read()
            before = known.get(client, Spent())
            after = Spent(before.updates + updates, before.mu_squared + updates * mu_squared)
            if self.epsilon is not None:
                self._check(client, before, after)
            entries = {name: asdict(spent) for name, spent in (known | {client: after}).items()}
            write_json(self.kit / BUDGET_FILE, {"delta": self.delta, "clients": entries})

    def _check(self, client: str, before: Spent, after: Spent) -> None:
        used, needed = (epsilon_of(spent.mu_squared, self.delta) for spent in (before, after))
        limit = self.epsilon or 0.0
        if needed > limit * (1 + _SLACK):
            raise RefusedError(
                f"the privacy budget of client {client} does not suffice: its updates so far "
                f"({before.updates}) have ε = {used:.4g} of {limit:.4g} at δ = {self.delta:g}, and "
                f"{after.updates - before.updates} more would make it {needed:.4g}; "
                f"the site can set a larger privacy.epsilon in {SITE_FILE}"
            )

    def _read(self) -> dict[str, Spent]:
        path = self.kit / BUDGET_FILE
        document = read_json(path)
        if document is None:
            return {}
        try:
            return {name: _entry(entry) for name, entry in document["clients"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FederateError(
                f"{path}: damaged ({type(error).__name__}), so the budget that the site's clients "
                "have spent is unknown; restore the file from a backup"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.kit / f".{BUDGET_FILE}.lock"):
            yield


def _entry(entry: dict[str, Any]) -> Spent:
    spent = Spent(**entry)
    if type(spent.updates) is not int or spent.updates < 0 or not 0 <= spent.mu_squared < math.inf:
        raise ValueError(f"{spent} is not a count")
    return Spent(spent.updates, float(spent.mu_squared))

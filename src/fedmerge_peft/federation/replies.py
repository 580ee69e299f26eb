"""Collection of one round's replies: valid ones are kept, failures are recorded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedmerge_peft.data import Client
from fedmerge_peft.errors import ClientError, TooFewClientsError
from fedmerge_peft.federation.reply_checks import validate_reply
from fedmerge_peft.recipe.clients import ClientsRecipe
from fedmerge_peft.strategies.base import Reply, Strategy
from fedmerge_peft.training.plan import Plan
from fedmerge_peft.util.row_buffer import RowBuffer

log = logging.getLogger(__name__)

_SHOWN = 5
"""Maximum number of failures that an error lists. The log has all of them."""


@dataclass(frozen=True)
class RoundReplies:
    """The valid replies of one round."""

    replies: list[Reply]
    trained: dict[int, Tensor]
    """Shared adapters as trained by each client, ``(k, P)``, by client index."""
    failures: dict[str, str] = field(default_factory=dict)
    """Cause of each failure, by client name."""


class ReplyCollector:
    """Collector of the replies of one round, which may arrive in any order.

    Args:
        round: Number of the round.
        cohort: Indices of the clients that were selected.
        clients: All clients.
        recipe: Section ``clients``, with ``failures``, ``min_clients`` and ``timeout``.
        strategy: Strategy of the round; ``trained_rows`` selects the shared adapters.
    """

    def __init__(
        self,
        round: int,
        cohort: Sequence[int],
        clients: Sequence[Client],
        recipe: ClientsRecipe,
        strategy: Strategy,
    ) -> None:
        self._round = round
        self._cohort = cohort
        self._clients = clients
        self._recipe = recipe
        self._strategy = strategy
        self._waiting = set(cohort)
        self._replies: dict[int, Reply] = {}
        self._trained: dict[int, Tensor] = {}
        self._failures: dict[str, str] = {}
        self._deltas = RowBuffer(expected_calls=len(cohort))
        self._rows = RowBuffer(expected_calls=len(cohort))

    def add(self, plan: Plan, answer: Reply | ClientError) -> bool:
        """Add one answer; return True if it is a valid reply.

        Raises:
            ClientError: The answer is a failure or an invalid reply, and ``clients.failures`` is
                raise.
        """
        if isinstance(answer, ClientError):
            self._fail(answer.client, answer.cause, answer)
            return False
        client = answer.client
        if client not in self._waiting:
            if client in self._cohort:  # the genuine reply cannot be identified
                self._fail(self._clients[client].name, "it replied more than once")
            else:
                self._fail(str(client), "it was not selected for this round")
            return False
        self._waiting.remove(client)
        name, size = self._clients[client].name, self._clients[client].size
        cause = validate_reply(answer, plan, self._round, size, self._recipe.timeout)
        if cause is not None:
            self._fail(name, cause)
            return False
        self._trained[client] = self._rows.append(self._strategy.trained_rows(plan, answer))
        self._replies[client] = replace(answer, deltas=self._deltas.append(answer.deltas))
        return True

    def close(self) -> RoundReplies:
        """Return the valid replies.

        Raises:
            ClientError: A client did not reply, and ``clients.failures`` is raise.
            TooFewClientsError: Fewer than ``clients.min_clients`` replies are valid, or not all
                replies of a smaller Poisson sample.
        """
        for client in self._cohort:
            name = self._clients[client].name
            if client not in self._replies and name not in self._failures:
                self._fail(name, "it did not reply")
        replies = [
            reply
            for client, reply in self._replies.items()
            if self._clients[client].name not in self._failures
        ]
        if len(replies) < min(self._recipe.min_clients, len(self._cohort)):
            causes = [f"{name}: {cause}" for name, cause in self._failures.items()]
            more = f"; and {len(causes) - _SHOWN:,} more" if len(causes) > _SHOWN else ""
            raise TooFewClientsError(
                f"round {self._round}: {len(replies)} of {len(self._cohort)} "
                f"client{'s' * (len(self._cohort) != 1)} sent valid replies, but "
                f"clients.min_clients is {self._recipe.min_clients}, so the round had no effect. "
                f"Failures: {'; '.join(causes[:_SHOWN])}{more}"
            )
        return RoundReplies(replies, self._trained, self._failures)

    def _fail(self, client: str, cause: str, error: ClientError | None = None) -> None:
        error = error or ClientError(client, self._round, cause)
        if self._recipe.failures == "raise":
            raise error
        log.warning("%s; skipped", error)
        self._failures[client] = cause

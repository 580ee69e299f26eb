"""State of one client's work in one round: time, scores, and result or failure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedmerge_peft.data import Client
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.errors import ClientError, FedMergeError
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import ClientResult
from fedmerge_peft.util.vectors import all_finite

_NOT_FINITE = (
    "its adapter is not finite after training; "
    "lower training.learning_rate, and set training.max_grad_norm if it is null"
)


@dataclass
class ClientTurn:
    """State of one client's work, from its assignment to its reply."""

    round: int
    index: int
    client: Client
    assignment: Assignment
    seconds: float = 0.0
    """Wall time (s) of this client's work, including its share of passes with other clients."""
    before: dict[str, float] | None = None
    """Scores of the served model, before local training."""
    result: ClientResult | None = None
    after: dict[str, float] | None = None
    """Scores after local training."""
    validation: tuple[float, ...] | None = None
    """Mean losses (nats) over the validation examples (``Reply.validation``)."""
    error: ClientError | None = None
    """Failure that ends the turn; None if there is none."""

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Context manager that adds the time of its block to ``seconds``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin

    def fail(self, error: Exception) -> None:
        """End the turn with an error."""
        self.error = client_error(self.client, self.round, error)

    def finish(self, outcome: ClientResult | Exception) -> None:
        """Store the outcome of the client's plan: a finite result, or an error."""
        if isinstance(outcome, Exception):
            self.fail(outcome)
        elif not all_finite(outcome.deltas):
            self.error = ClientError(self.client.name, self.round, _NOT_FINITE)
        else:
            self.result = outcome

    def reply(self) -> Reply | ClientError:
        """Return the client's reply, or the error that ended its turn."""
        if self.error is not None or self.result is None:
            return self.error or ClientError(
                self.client.name, self.round, "its training did not finish"
            )
        return Reply(
            client=self.index,
            deltas=self.result.deltas,
            size=self.client.size,
            train_loss=self.result.loss,
            seconds=self.seconds,
            served=self.before,
            finetuned=self.after,
            choice=self.result.choice,
            weights=self.result.weights,
            statistics=self.result.statistics,
            validation=self.validation,
            round=self.round,
        )


@contextmanager
def shared_clock(turns: Sequence[ClientTurn]) -> Iterator[None]:
    """Context manager that adds the time of its block to the turns, in equal parts."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        for turn in turns:
            turn.seconds += (time.perf_counter() - begin) / len(turns)


def client_error(client: Client, round: int, error: Exception, when: str = "") -> ClientError:
    """Return a ``ClientError`` that names the client, with the original error as its cause.

    ``when`` is a prefix of the message that states when the error occurred.
    """
    text, kind = str(error), type(error).__name__
    if not isinstance(error, FedMergeError):
        text = f"{kind}: {text}" if text else kind
    named = ClientError(client.name, round, f"{when}{text}")
    named.__cause__ = error
    return named

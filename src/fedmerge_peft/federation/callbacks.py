"""Hooks at the start of a run, after each reply, after each round, and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from fedmerge_peft import distributed
from fedmerge_peft.runs.record import RoundRecord

if TYPE_CHECKING:
    from fedmerge_peft.federation.loop import Federation
    from fedmerge_peft.runs.directory import RunDirectory
    from fedmerge_peft.strategies.base import Reply


class Callback:
    """Hooks of a run: override methods, or pass functions (``Callback(on_round=print)``).

    The recipe's strategy and each of its baselines are separate runs; each has a start and an end.
    ``stop`` ends the run after its current round, with final scores. On several ranks, every rank
    calls the hooks, and ``stop`` on one rank is enough. An exception from a hook ends the run,
    which can be resumed.
    """

    def __init__(self, **hooks: Callable[..., object]) -> None:
        """Replace hooks by functions. Raises ``TypeError`` for an unknown hook."""
        for name, hook in hooks.items():
            if not name.startswith("on_") or not hasattr(Callback, name):
                hooks_there = ", ".join(hook for hook in vars(Callback) if hook.startswith("on_"))
                raise TypeError(f"a callback has no hook {name!r}; choose from {hooks_there}")
            setattr(self, name, hook)

    stopped = False
    """True if ``stop`` was called in the current run."""

    def stop(self) -> None:
        """End the run after its current round, with final scores. Later baselines still run."""
        self.stopped = True

    def on_start(self, federation: Federation, run: RunDirectory) -> None:
        """Called before the first remaining round."""

    def on_client(self, reply: Reply) -> None:
        """Called for each client's valid reply."""

    def on_round(self, record: RoundRecord) -> None:
        """Called after each round has been written to disk."""

    def on_end(self, run: RunDirectory) -> None:
        """Called after the final scores have been written to disk."""


class Callbacks(Callback):
    """Several callbacks, called in order on all ranks."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        """Raise ``TypeError`` for an object that is not a callback."""
        super().__init__()
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(
                    f"callbacks: found {callback!r}, expected a Callback, such as "
                    "Callback(on_round=print)"
                )

    def any_stopped(self) -> bool:
        """Return True if a callback on any rank has stopped the run."""
        stopped = any(callback.stopped for callback in self._callbacks)
        return any(distributed.all_gather(lambda: stopped))

    def on_start(self, federation: Federation, run: RunDirectory) -> None:
        for callback in self._callbacks:
            callback.stopped = False
        self._each(lambda callback: callback.on_start(federation, run))

    def on_client(self, reply: Reply) -> None:
        for callback in self._callbacks:
            callback.on_client(reply)

    def on_round(self, record: RoundRecord) -> None:
        self._each(lambda callback: callback.on_round(record))

    def on_end(self, run: RunDirectory) -> None:
        self._each(lambda callback: callback.on_end(run))

    def _each(self, hook: Callable[[Callback], None]) -> None:
        """Call a hook of each callback; an exception on one rank is raised on all."""
        for callback in self._callbacks:
            distributed.on_all_ranks(partial(hook, callback))

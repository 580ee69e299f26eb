"""The processes of ``accelerate launch`` or ``torchrun``: all run the same program, and this is where they speak with each other.

Every rank must come to each of these calls, in the same order: what decides whether it does has to be the same on all of them. An error
is told to the others, so that all raise and none waits. In a process of its own each call does its work, and that is all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from fedmerge_peft.errors import DeviceError, FedMergeError, RankError

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def launched() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def is_main() -> bool:
    """Whether this is the one that writes and prints."""
    return rank() == 0


def world_size() -> int:
    """How many ranks work together; 1 until ``training.device.make_accelerator`` has brought them together."""
    from accelerate.state import PartialState, is_initialized

    return int(PartialState().num_processes) if is_initialized() else 1


def all_gather(work: Callable[[], T]) -> list[T]:
    """What each rank's work gives, by rank; small, as it is pickled.

    Raises:
        BaseException: What this rank's work raised; else what that of the lowest rank did, as a ``RankError`` unless it was on purpose.
            ``FedMergeError.rank`` is the lowest that failed.
        RankError: Another rank has ended.
    """
    if world_size() == 1:
        return [work()]
    found: list[T] = []
    failure: BaseException | None = None
    try:
        found.append(work())
    except BaseException as error:
        failure = error
    from accelerate.utils import gather_object

    with _speaking():
        told = gather_object([(found, None if failure is None else _portable(failure))])
    lowest, theirs = next(
        ((rank, error) for rank, (_, error) in enumerate(told) if error is not None), (0, None)
    )
    raised = failure or theirs
    if raised is None:
        return [each for values, _ in told for each in values]
    if isinstance(raised, FedMergeError):
        raised.rank = lowest
    raise raised


def on_all_ranks(work: Callable[[], T]) -> T:
    """What this rank's own work gives, once that of all ranks is done. Raises as ``gathered``."""
    kept: list[T] = []
    all_gather(lambda: kept.append(work()))
    return kept[0]


def on_rank_zero(work: Callable[[], T]) -> T:
    """What the work gives on the first rank, which alone does it, on all ranks; it is pickled. Raises as ``gathered``."""
    if world_size() == 1:
        return work()
    done = [on_all_ranks(work) if is_main() else on_all_ranks(lambda: None)]
    from accelerate.utils import broadcast_object_list

    with _speaking():
        found: T = broadcast_object_list(done, from_process=0)[0]
    return found


def rank_zero(method: Callable[P, T]) -> Callable[P, T]:
    """Turn a function into one that runs on rank 0 alone: a decorator over ``on_rank_zero``.

    All ranks call it, return its result, which is pickled, and raise its errors.
    """

    @wraps(method)
    def collective(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_rank_zero(partial(method, *args, **kwargs))

    return collective


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """The owner's tensor on all ranks, on the CPU; the others give one of the same shape and dtype, which may be written to."""
    if world_size() == 1:
        return tensor
    from accelerate.state import PartialState
    from accelerate.utils import broadcast

    with _speaking():
        found: Tensor = broadcast(tensor.to(PartialState().device), from_process=owner)
    return found.cpu()


def refuse_ranks(what: str) -> None:
    """Raise ``DeviceError`` where a launcher has started several ranks, for what only works in a process of its own."""
    if launched() > 1:
        raise DeviceError(
            f"{what} does not run on several ranks: start it without the launcher, once for each device"
        )


def leave() -> None:
    """Part from the others, at the end of the program: a process group that is left to the interpreter's end complains."""
    if world_size() > 1:
        from accelerate.state import PartialState

        PartialState().destroy_process_group()


def wait_for_launcher(seconds: float = 5.0) -> None:
    """Wait, before this rank ends for a fault that another says: a launcher ends all ranks as soon as the first has ended."""
    time.sleep(seconds)  # SIGTERM, the launcher's way, ends it


@contextmanager
def _speaking() -> Iterator[None]:
    """Turn what a broken connection raises, whatever the backend, into one error."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} has lost the others: one of them has ended, and says why, or was killed"
        ) from error


def _portable(error: BaseException) -> BaseException:
    """An error as the other ranks raise it."""
    if isinstance(error, FedMergeError | KeyboardInterrupt):
        return error
    return RankError(f"rank {rank()} failed, and says where: {type(error).__name__}: {error}")

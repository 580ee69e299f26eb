"""The processes of ``accelerate launch`` or ``torchrun``: all run the same program, and this is where they speak with each other.

Every rank must come to each of these calls, in the same order: what decides whether it does has to be the same on all of them. An error
is told to the others, so that all raise and none waits. In a process of its own each call does its work, and that is all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from fedmerge_peft.errors import DeviceError, FedMergeError, RankError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def launched_processes() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", "0")) if launched_processes() > 1 else 0


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

    with _translated_errors():
        told = gather_object([(found, None if failure is None else _picklable_error(failure))])
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

    with _translated_errors():
        found: T = broadcast_object_list(done, from_process=0)[0]
    return found


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """The owner's tensor on all ranks, on the CPU; the others give one of the same shape and dtype, which may be written to."""
    if world_size() == 1:
        return tensor
    from accelerate.state import PartialState
    from accelerate.utils import broadcast

    with _translated_errors():
        found: Tensor = broadcast(tensor.to(PartialState().device), from_process=owner)
    return found.cpu()


def require_single_process(what: str) -> None:
    """Raise ``DeviceError`` where a launcher has started several ranks, for what only works in a process of its own."""
    if launched_processes() > 1:
        raise DeviceError(
            f"{what} does not run on several ranks: start it without the launcher, once for each device"
        )


def destroy_process_group() -> None:
    """Part from the others, at the end of the program: a process group that is left to the interpreter's end complains."""
    if world_size() > 1:
        from accelerate.state import PartialState

        PartialState().destroy_process_group()


def wait_for_launcher(seconds: float = 5.0) -> None:
    """Wait, before this rank ends for a fault that another says: a launcher ends all ranks as soon as the first has ended."""
    time.sleep(seconds)  # SIGTERM, the launcher's way, ends it


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turn what a broken connection raises, whatever the backend, into one error."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} has lost the others: one of them has ended, and says why, or was killed"
        ) from error


def _picklable_error(error: BaseException) -> BaseException:
    """An error as the other ranks raise it."""
    if isinstance(error, FedMergeError | KeyboardInterrupt):
        return error
    return RankError(f"rank {rank()} failed, and says where: {type(error).__name__}: {error}")

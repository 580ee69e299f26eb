"""Communicate between the ranks that ``accelerate launch`` or ``torchrun`` starts.

All ranks run the same program. Every rank must call the collective functions (``all_gather``,
``on_all_ranks``, ``on_rank_zero``, ``broadcast``) in the same order, so conditions around them must
be identical on all ranks. If the work that such a function runs fails on one rank, an error is
raised on all ranks, so no rank hangs. Without a launcher, a collective function runs its work in
the only process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from fedmerge_peft.errors import DeviceError, FedMergeError, RankError

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def launched_processes() -> int:
    """Return the number of processes that a launcher started, or 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if launched_processes() > 1 else 0


def is_main() -> bool:
    """Return True on rank 0, which writes files and prints."""
    return rank() == 0


def world_size() -> int:
    """Return the number of ranks in the process group.

    The value is 1 until ``training.accelerator.make_accelerator`` creates the group.
    """
    from accelerate.state import PartialState, is_initialized

    return int(PartialState().num_processes) if is_initialized() else 1


def all_gather(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank and return the results by rank.

    Results are pickled, so they should be small.

    Raises:
        BaseException: ``work`` raised this error on this rank. If ``work`` failed on other ranks
            only, the error of the lowest failed rank is raised. Errors other than
            ``FedMergeError`` and ``KeyboardInterrupt`` then become a ``RankError``. The attribute
            ``rank`` of a ``FedMergeError`` is the lowest failed rank.
        RankError: Another rank has exited.
    """
    if world_size() == 1:
        return [work()]
    result: list[T] = []  # empty if this rank fails
    failure: BaseException | None = None
    try:
        result.append(work())
    except BaseException as error:
        failure = error
    from accelerate.utils import gather_object

    with _translated_errors():
        outcomes = gather_object([(result, None if failure is None else _picklable_error(failure))])
    lowest, remote_failure = next(
        ((rank, error) for rank, (_, error) in enumerate(outcomes) if error is not None), (0, None)
    )
    raised = failure or remote_failure
    if raised is None:
        return [value for values, _ in outcomes for value in values]
    if isinstance(raised, FedMergeError):
        raised.rank = lowest
    raise raised


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, wait for all ranks, and return this rank's result.

    Raises the errors of ``all_gather``.
    """
    results: list[T] = []
    all_gather(lambda: results.append(work()))
    return results[0]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 only and return its result on all ranks.

    The result is pickled. Raises the errors of ``all_gather``.
    """
    if world_size() == 1:
        return work()
    done = [on_all_ranks(work) if is_main() else on_all_ranks(lambda: None)]
    from accelerate.utils import broadcast_object_list

    with _translated_errors():
        result: T = broadcast_object_list(done, from_process=0)[0]
    return result


def rank_zero(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run on rank 0 only (``on_rank_zero``).

    All ranks must call the function. Its result is pickled and returned on all ranks; its errors
    are raised on all ranks.
    """

    @wraps(method)
    def collective(*args: P.args, **kwargs: P.kwargs) -> T:
        return on_rank_zero(partial(method, *args, **kwargs))

    return collective


def broadcast(tensor: Tensor, owner: int) -> Tensor:
    """Return the tensor of rank ``owner`` on all ranks, on the CPU.

    A single process returns ``tensor`` itself, on its device.

    Args:
        tensor: On ``owner``, the tensor to send. On other ranks, a tensor of the same shape and
            dtype, which may be overwritten.
        owner: Rank that sends its tensor.

    Raises:
        RankError: Another rank has exited.
    """
    if world_size() == 1:
        return tensor
    from accelerate.state import PartialState
    from accelerate.utils import broadcast

    with _translated_errors():
        received: Tensor = broadcast(tensor.to(PartialState().device), from_process=owner)
    return received.cpu()


def require_single_process(what: str) -> None:
    """Raise ``DeviceError`` if a launcher started several ranks.

    ``what`` is the subject of the message, such as ``a sweep``.
    """
    if launched_processes() > 1:
        raise DeviceError(
            f"{what} does not run on several ranks: start it without torchrun or another "
            "launcher; to use several GPUs, start it once for each (CUDA_VISIBLE_DEVICES)"
        )


def destroy_process_group() -> None:
    """Leave the process group at the end of the program.

    Torch warns about process groups that still exist when the interpreter exits.
    """
    if world_size() > 1:
        from accelerate.state import PartialState

        PartialState().destroy_process_group()


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Convert the backend-specific errors of a broken connection to ``RankError``."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} lost the connection to another rank, which exited or was killed; "
            "read the messages of the other ranks"
        ) from error


def _picklable_error(error: BaseException) -> BaseException:
    """Return a picklable error to raise on the other ranks."""
    if isinstance(error, FedMergeError | KeyboardInterrupt):
        return error
    return RankError(
        f"rank {rank()} failed and printed a traceback: {type(error).__name__}: {error}"
    )

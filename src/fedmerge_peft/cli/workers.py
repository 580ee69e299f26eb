"""Option ``--workers``: torch's launcher starts processes that share the clients of a round."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from fedmerge_peft.cli.app import app
from fedmerge_peft.cli.exit_codes import errors_as_messages
from fedmerge_peft.distributed import launched_processes
from fedmerge_peft.errors import DeviceError, RankError

Workers = Annotated[
    str,
    typer.Option(
        metavar="N",
        help="Processes that share the clients of a round, each on its GPU or its share of the "
        "CPU cores. auto: one for each GPU; without a GPU, one for each core, at most 4.",
    ),
]

_MOST_ON_CPU = 4
"""Maximum number of processes on a CPU with ``auto``; each loads the backbone and the data."""
_SECONDS_TO_STOP = 600
"""Time in seconds that the processes have, after a signal, to finish their round."""


def number_of_workers(requested: str, device: str) -> int:
    """Return the number of processes for the option ``--workers``.

    Args:
        requested: The option's value.
        device: The recipe's ``training.device``.

    Raises:
        DeviceError: The value is neither ``auto`` nor an integer of at least 1, or a launcher has
            already started several processes and the value is neither ``auto`` nor 1.
    """
    if requested == "1" or (requested == "auto" and launched_processes() > 1):
        return 1
    if launched_processes() > 1:
        raise DeviceError(
            f"--workers {requested}: a launcher has already started {launched_processes()} "
            "processes; leave --workers out"
        )
    if requested == "auto":
        return _automatic(device)
    if not requested.isdecimal() or int(requested) < 1:
        raise DeviceError(f"--workers {requested}: give a whole number of at least 1, or auto")
    return int(requested)


def _automatic(device: str) -> int:
    """Return the number of GPUs. Return 1 for a single device, such as ``mps`` or ``cuda:1``.

    Without a GPU, or if ``device`` is ``cpu``, return the number of CPU cores, at most 4.
    """
    import torch

    if device not in ("auto", "cuda", "cpu"):
        return 1
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return gpus or min(_cores(), _MOST_ON_CPU)


def run_on_workers(count: int, arguments: Sequence[str]) -> None:
    """Run ``fedmerge`` with these arguments on several ranks.

    Unless ``OMP_NUM_THREADS`` is set, each process uses as many threads as its share of the CPU
    cores. On Linux without a GPU, the ranks are forks of this process, which imports the libraries
    once for all of them.

    Raises:
        RankError: A process was killed.
        typer.Exit: A rank failed, or a signal stopped the program. The exit code is that of the
            rank that failed first, or 128 + signal number.
    """
    share_cores(count)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_STOP))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        # Silence the launcher's loggers: the ranks print their errors themselves.
        if name.startswith(("torch.distributed", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with TemporaryDirectory(prefix="fedmerge-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork",  # applies to functions; programs are started anew
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        program: str | Callable[..., None] = sys.executable
        options: Sequence[object] = ("-m", "fedmerge_peft", *arguments)
        if _forks():
            _import_libraries()
            program, options = _run_forked, (arguments,)
        try:
            elastic_launch(config, program)(*options)
        except ChildFailedError as error:
            number, first = error.get_first_failure()
            if first.exitcode < 0:  # killed, before it could print an error
                name = first.signal_name()
                memory = ", for example because memory ran out; use fewer workers"
                raise RankError(
                    f"rank {number} of {count} was killed ({name})"
                    f"{memory if name == 'SIGKILL' else ''}. fedmerge resume continues from the "
                    "last finished round"
                ) from None
            raise typer.Exit(first.exitcode) from None
        except SignalException as stopped:
            raise typer.Exit(128 + stopped.sigval) from None


def share_cores(count: int) -> None:
    """Let each of ``count`` child processes use as many threads as its share of the CPU cores.

    If ``OMP_NUM_THREADS`` is set in the environment, it is not changed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))


def _forks() -> bool:
    """Return True if ranks may be forks: on Linux without a CUDA GPU."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def _import_libraries() -> None:
    """Import the modules that all ranks need, without starting threads or tensor operations."""
    import datasets  # noqa: F401
    import peft  # noqa: F401

    from fedmerge_peft.engines import distributed  # noqa: F401
    from fedmerge_peft.federation import federate  # noqa: F401


def _run_forked(arguments: Sequence[str]) -> None:
    """Run ``fedmerge`` in a forked rank, as in a new process."""
    import torch

    os.setsid()  # Ctrl-C in a terminal reaches only the launcher, which forwards it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(
        int(os.environ["OMP_NUM_THREADS"])
    )  # torch may have been imported before the variable was set
    try:
        with errors_as_messages():
            app(arguments, prog_name="fedmerge")
    except Exception:  # the launcher would not print the traceback
        traceback.print_exc()
        sys.exit(1)


def _cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

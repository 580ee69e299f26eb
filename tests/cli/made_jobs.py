"""Processes that stand in for those of ``fedmerge sweep --jobs``."""

import os
import signal
import time
from pathlib import Path

from fedmerge_peft.errors import RunError


def all_events(source, values, out, events):
    """Both processes know of both runs; the first has run "a", and "b" fails in both."""
    first = _is_first(out)
    if first:
        events.send(("round", "a", 1, 2, "round 1/2"))
        time.sleep(0.5)
        events.send(("ended", "a", "fresh", True))
    else:
        time.sleep(0.2)
        events.send(("ended", "a", "finished before", False))
    events.send(("failed", "b", "b is wrong\nsecond line"))


def killed(source, values, out, events):
    """The first process ends "a" and is killed in "b"."""
    if _is_first(out):
        events.send(("ended", "a", "fresh", True))
        os.kill(os.getpid(), signal.SIGKILL)


def silent(source, values, out, events):
    """The first process ends "a", and no process runs "b"."""
    if _is_first(out):
        events.send(("ended", "a", "fresh", True))


def refused(source, values, out, events):
    """The whole sweep is refused."""
    events.send(("fault", "", RunError("taken cannot be written")))


def until_stopped(source, values, out, events):
    """Runs until a signal stops it."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    events.send(("round", "a", 1, 2, "round 1/2"))
    time.sleep(60)


def _is_first(out):
    try:
        Path(out / "first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

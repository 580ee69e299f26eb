"""A program whose children run or resume a federation and may be killed.

It loads a backbone once and forks a child for each line of its input. A line is JSON with ``path``,
``strategy`` and ``kill``. ``kill`` is null, ``["after", seconds]``, ``["event", n]`` (before the
child opens, renames, links, truncates or removes a file below the path for the n-th time) or
``["torn", n]`` (after half of the n-th file of tensors is written). The answer is
``[killed, number of events, error]``, with the text of a ``RunError`` or null.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from fedmerge_peft import Recipe, Run, RunError, federate, resume
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.util import files

SMALL = [
    "data.max_train=4",
    "data.max_test=3",
    "data.filter.provider=[Alder, Birch]",
    "training.device=cpu",
    "evaluation.finetuned=false",
]
EVENTS = {"open", "os.rename", "os.link", "os.truncate", "os.remove", "os.mkdir"}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watch(path, number, seen):
    """Count the child's events; exit before the n-th."""

    def hook(event, arguments):
        if event in EVENTS and any(str(argument).startswith(path) for argument in arguments[:2]):
            seen[0] += 1
            if seen[0] == number:
                die()

    sys.addaudithook(hook)


def tear(number):
    """Exit after half of the n-th file of tensors is written."""
    left = [number]
    save_file = files.save_file

    def half(tensors, path, **settings):
        save_file(tensors, path, **settings)
        left[0] -= 1
        if left[0] == 0:
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    files.save_file = half


def go(path, strategy, engine):
    """Start or resume the run; do nothing if it has ended."""
    recipe = Recipe.load("smoke", [*SMALL, *strategy])
    reused = engine.with_recipe(recipe)
    if not (path / "recipe.yaml").exists():
        federate(recipe, path, engine=reused)
    elif not Run.open(path).ended:
        resume(path, engine=reused)
    assert reused.clients_per_batch == recipe.training.clients_per_batch


def child(asked, engine, write):
    how, number = asked["kill"] or ("event", 0)
    seen = [0]
    watch(asked["path"], number if how == "event" else 0, seen)
    if how == "torn":
        tear(number)
    error = None
    try:
        go(Path(asked["path"]), asked["strategy"], engine)
    except RunError as failed:
        error = str(failed)
    os.write(write, json.dumps([seen[0], error]).encode())


def main():
    torch.set_num_threads(1)
    engine = LocalEngine.from_recipe(
        Recipe.load("smoke", SMALL)
    )  # trains nothing here: a fork would not like it
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(asked, engine, write)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        if asked["kill"] and asked["kill"][0] == "after":
            time.sleep(asked["kill"][1])
            os.kill(pid, signal.SIGKILL)  # an ended child is there until it is waited for
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
            sys.exit("the child failed")
        with os.fdopen(read) as answer:
            seen, error = json.loads(answer.read() or "[0, null]")
            print(json.dumps([os.WIFSIGNALED(status), seen, error]), flush=True)


if __name__ == "__main__":
    main()

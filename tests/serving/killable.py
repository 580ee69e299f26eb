"""A program whose children export a run and may be killed.

It opens the run in its first argument, and forks a child for each line of its input. A line is JSON
with ``kind`` (client, all or soup), ``folder`` and ``kill``: before the n-th file operation next to
or below the folder the child is killed; never for 0. The answer is ``[status, operations]``.
"""

import json
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedmerge_peft import Run
from fedmerge_peft.serving import export

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def watch(place, number, seen):
    def hook(event, arguments):
        if event in OPERATIONS and any(str(one).startswith(place) for one in arguments[:2]):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def write(run, kind, folder):
    if kind == "client":
        export.export_client(run, run.client_names[0], folder)
    else:
        {"all": export.export_all, "soup": export.export_soup}[kind](run, folder)


def main():
    run = Run.open(sys.argv[1])
    with TemporaryDirectory() as folder:  # imports what the children need
        write(run, "client", Path(folder) / "export")
    for line in sys.stdin:
        asked = json.loads(line)
        read, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code, seen = 1, [0]
            try:
                watch(str(Path(asked["folder"]).parent), asked["kill"], seen)
                write(run, asked["kind"], Path(asked["folder"]))
                os.write(answer, json.dumps(seen[0]).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(answer)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as text:
            operations = json.loads(text.read() or "0")
        print(json.dumps([os.waitstatus_to_exitcode(status), operations]), flush=True)


if __name__ == "__main__":
    main()

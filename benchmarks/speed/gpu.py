"""Measure speed on one GPU, on random decoders: QLoRA, clients in one pass, rounds, memory.

    benchmarks/speed/gpu.sh                 # all parts, in less than ten minutes
    benchmarks/speed/gpu.sh --tiny          # tiny models on the CPU, as the tests run it

Each part has a share of the time, and what one does not use goes to the next ones. A part that
exceeds its share is cut; its rows so far are kept. A part that fails or is cut does not affect the
others, but the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import TABLE, seconds

PARTS = {
    "qlora": (130, "QLoRA on 8 billion parameters: tokens a second and memory."),
    "together": (100, "K clients in one pass against one at a time, with the peak of memory."),
    "overhead": (60, "Rounds of one client at a time against plain loops with PEFT."),
    "memory": (45, "Memory as `fedmerge estimate` computes it, over the measured peak."),
    "prefix": (35, "LoRA on the last third of the layers: cached or recomputed frozen layers."),
    "evaluation": (
        25,
        "Evaluation with logits at the labeled quarter of the positions, or at all.",
    ),
    "server": (45, "The server step of FedMerge, on the CPU."),
}
"""Seconds of each part out of their sum, and what it measures; the most important parts first."""
WORKER = Path(__file__).resolve().with_name("gpu_worker.py")


@dataclass
class Outcome:
    """What a part measured."""

    rows: list[str] = field(default_factory=list)
    error: str = ""
    """Why the part ended early; empty if it did not."""
    seconds: float = 0.0


class Worker:
    """A process that runs parts one after another and reports what they measure, line by line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._events.put(json.loads(line))
        self._events.put(None)

    def next(self, until: float) -> dict[str, Any] | None:
        """Return the next event; None if the process has ended.

        Raises:
            TimeoutError: There is none before ``until``, a time of ``time.monotonic``.
        """
        try:
            return self._events.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> int:
        """End the process if it still runs, and return its exit status."""
        self._process.kill()
        self._reader.join()
        return self._process.wait()


def run_parts(
    names: Sequence[str],
    command: Sequence[str],
    limit: float,
    changed: Callable[[str, dict[str, Outcome]], object] = lambda *_: None,
) -> tuple[str, dict[str, Outcome]]:
    """Run parts in a process, and the rest in a new process after one that failed or was cut.

    Args:
        names: Parts in their order.
        command: Command of the process, to which the names of the parts are added.
        limit: Seconds for all of them.
        changed: Called with the description of the device and the outcomes after each part.

    Returns:
        Description of the device, and the outcome of each part.
    """
    end = time.monotonic() + limit
    device, outcomes = "unknown", {}
    worker: Worker | None = None
    for number, name in enumerate(names):
        begin, left = time.monotonic(), names[number:]
        until = begin + (end - begin) * PARTS[name][0] / sum(PARTS[each][0] for each in left)
        outcome = outcomes[name] = Outcome()
        worker = worker or Worker([*command, *left])
        ended = False
        while not ended and not outcome.error:
            try:
                event = worker.next(until)
            except TimeoutError:
                outcome.error = f"Cut after {seconds(time.monotonic() - begin)}."
                break
            if event is None:
                outcome.error = f"The process ended early, with status {worker.stop()}."
                break
            device = event.get("device", device)
            outcome.error = event.get("error", "")
            ended = event.get("ended", False)
            if "row" in event:
                print(event["row"], flush=True)
                outcome.rows.append(event["row"])
        outcome.seconds = time.monotonic() - begin
        if outcome.error:
            print(f"{name}: {outcome.error}", file=sys.stderr, flush=True)
            worker.stop()
            worker = None
        changed(device, outcomes)
    if worker is not None:
        worker.stop()
    return device, outcomes


def page(device: str, outcomes: dict[str, Outcome]) -> str:
    """Return the text of the results."""
    text = "# Speed on one device\n"
    for name, outcome in outcomes.items():
        text += f"\n## {name}\n\n{PARTS[name][1]}\n\n"
        if outcome.rows:
            text += TABLE + "".join(f"{row}\n" for row in outcome.rows) + "\n"
        text += f"{outcome.error}\n\n" if outcome.error else ""
        text += f"Measured in {seconds(outcome.seconds)}, with the start of the process.\n"
    return f"{text}\n{device}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--seconds", type=float, default=440, help="time limit; default: 440")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="page to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if not options.tiny:
        import torch

        if not torch.cuda.is_available():
            parser.error("this machine has no CUDA GPU; --tiny measures tiny models on the CPU")
        from random_llama import scratch
    with TemporaryDirectory(dir=None if options.tiny else scratch()) as folder:
        command = [sys.executable, str(WORKER), folder, "tiny" if options.tiny else "gpu"]
        _, outcomes = run_parts(
            options.parts or list(PARTS),
            command,
            options.seconds,
            lambda *found: options.out.write_text(page(*found), encoding="utf-8"),
        )
    if failed := [name for name, outcome in outcomes.items() if outcome.error]:
        sys.exit(f"not measured completely: {', '.join(failed)}; see {options.out}")


if __name__ == "__main__":
    main()

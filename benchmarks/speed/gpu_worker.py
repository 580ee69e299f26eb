"""Run parts of the GPU benchmark, and print an event as a line of JSON for each row and each end.

    python benchmarks/speed/gpu_worker.py FOLDER (gpu|tiny) PART ...

The process ends after a part that failed, because an error can leave the GPU in a bad state.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def work(names: Sequence[str], bench: Any, report: Callable[[dict[str, Any]], object]) -> bool:
    """Run parts, and report each row and each end; return False after a part that fails."""
    import gpu_parts
    import torch

    for name in names:
        try:
            for row in getattr(gpu_parts, name)(bench):
                report({"row": str(row)})
        except Exception as error:
            traceback.print_exc()
            reason = str(error).strip() or "no message"
            report({"error": f"Failed: {type(error).__name__}: {reason}"})
            return False
        report({"ended": True})
        gc.collect()
        torch.cuda.empty_cache()
    return True


def main(folder: str, size: str, *names: str) -> None:
    """Run parts with models in a folder."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no event

    def report(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    import gpu_parts
    import torch
    from pages import stamp
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = "CPU" if size == "tiny" else torch.cuda.get_device_name()
    report({"device": f"{device}; {stamp()}"})
    scale = gpu_parts.TINY if size == "tiny" else gpu_parts.GPU
    if not work(names, gpu_parts.Bench(scale, Path(folder)), report):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Time the programs of examples/ten_lines, each as a whole process, from its start to the report.

    OMP_NUM_THREADS=1 python benchmarks/ten_lines.py

Writes benchmarks/results/ten_lines.md. Needs the extra demo.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "docs"))
from test_ten_lines import PROGRAMS, write_inputs  # noqa: E402


def measure(program: Path) -> tuple[float, float]:
    """Return the wall and the processor seconds of a program on three organizations' tickets."""
    with TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FEDMERGE_PREFIX_DISK": "0"}
        before, begin = os.times(), time.perf_counter()
        subprocess.run([sys.executable, str(program)], cwd=folder, env=environment, check=True)
        wall, after = time.perf_counter() - begin, os.times()
    spent = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    return wall, spent


def main() -> None:
    rows = [
        "# Ten lines",
        "",
        "Time of the programs in `examples/ten_lines`, from the start of the process to the page:",
        "imports, loading, the choice of learning rate and epochs, four rounds of FedMerge and of",
        "local training on three organizations with about fifty tickets each, and the report. The",
        "wall time includes other load of the machine; the processor time does not.",
        "",
        "| program | from | wall time | processor time |",
        "|---|---|---|---|",
    ]
    sources = {
        "frame": "a pandas frame, MiniLM",
        "files": "three CSV files, MiniLM",
        "module": "an `nn.Module`, three CSV files",
    }
    for program in PROGRAMS:
        wall, spent = measure(program)
        rows.append(
            f"| `{program.stem}.py` | {sources[program.stem]} | {wall:.0f} s | {spent:.0f} s |"
        )
    threads = torch.get_num_threads()
    rows += [
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {threads} thread{'s' * (threads > 1)}, load "
        f"{os.getloadavg()[0]:.0f} on {os.cpu_count()} cores.",
        "",
    ]
    (ROOT / "benchmarks" / "results" / "ten_lines.md").write_text("\n".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

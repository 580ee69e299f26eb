"""Row e: memory and time of a server's round for each storage of FedMerge's soup."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from timing import Row, seconds

ADAPTERS, SIZE = 64, 4_000_000
"""Adapters, and numbers in each: 1 GB in float32."""
ASKED = 4
"""Clients per round."""
SOUPS = tuple(
    {"dtype": dtype, "storage": storage}
    for storage, dtype in product(("memory", "disk"), ("float32", "bfloat16"))
)


def rows() -> Iterator[Row]:
    """e. A round of FedMerge's server: four clients, 64 adapters of 4·10^6 numbers; by storage."""
    found = [_measured(soup) for soup in SOUPS]
    for soup, (memory, *times) in zip(SOUPS, found, strict=True):
        merge, step, save, whole = map(seconds, times)
        place = {"memory": "in memory", "disk": "on disk"}[soup["storage"]]
        yield Row.of(
            f"e. peak memory of float32 in memory over {soup['dtype']} {place}",
            [found[0][0] / memory],
            f"{memory:.0f} MB; merge {merge}, step {step}, save {save} of processor time; "
            f"in all {whole}, with waits",
        )


def _measured(soup: dict[str, str]) -> list[float]:
    """Return the result of ``serve`` in a new process."""
    command = [sys.executable, __file__, json.dumps(soup)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(part) for part in done.stdout.split()]


def serve(
    soup: dict[str, str], adapters: int, size: int, folder: Path
) -> tuple[float, float, float, float, float]:
    """Run the server's part of a round: merge, store replies, step, check the soup, save it.

    Args:
        soup: Section ``strategy.soup`` of a recipe.
        adapters: Number of adapters.
        size: Numbers in an adapter.
        folder: Folder for the files.

    Returns:
        Peak memory of the process in MB; seconds of processor time of one client's merge and reply,
        of the step with the copy for a failed round and the check of the result, and of saving the
        soup; seconds of all of them with waits.
    """
    import torch

    from fedmerge_peft.adapters.layout import AdapterLayout
    from fedmerge_peft.strategies import Reply, StrategyContext, make_strategy
    from fedmerge_peft.strategies.saved_state import SavedState
    from fedmerge_peft.testing import strategy_recipe
    from fedmerge_peft.util.row_buffer import RowBuffer

    layout = AdapterLayout.from_tensors([("layer.lora_A.weight", (100, size // 100), "lora")])
    generator = torch.Generator().manual_seed(0)
    strategy = make_strategy(
        strategy_recipe("fedmerge", adapters=adapters, start="independent", soup=soup),
        StrategyContext(
            ASKED,
            layout,
            lambda _: torch.randn(size // 100, generator=generator).repeat(100),
            folder=folder,
        ),
    )
    first, begin = time.perf_counter(), time.process_time()
    kept = RowBuffer(expected_calls=ASKED)
    replies = [
        Reply(client, kept.append(0.01 * strategy.plan(client).sent), 10, 1.0, 0.0)
        for client in range(ASKED)
    ]
    merged = time.process_time()
    saved = SavedState.of(strategy)
    strategy.update(replies)
    if fault := saved.fault_of_next(strategy):
        raise RuntimeError(fault)
    stepped = time.process_time()
    strategy.soup.save(folder / "soup.safetensors")
    end = time.process_time()
    whole = time.perf_counter() - first
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return memory, (merged - begin) / ASKED, stepped - merged, end - stepped, whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("soup", type=json.loads, help="section strategy.soup of a recipe, as JSON")
    with TemporaryDirectory(dir=".") as folder:
        print(*serve(parser.parse_args().soup, ADAPTERS, SIZE, Path(folder)))

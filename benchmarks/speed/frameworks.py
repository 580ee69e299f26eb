"""Row c: whole rounds against a plain loop, OpenFedLLM's, NVIDIA FLARE's and pfl-research's."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from timing import Row

REPEATS = 3
STEPS, CLIENTS = 10, 2
"""Steps of a client in a round, and clients of a round, as in Flower's example FlowerTune LLM."""


def rows() -> Iterator[Row]:
    """c. Rounds against a plain loop, OpenFedLLM's loop, NVIDIA FLARE and pfl-research."""
    from rivals import compared
    from workload import made

    rivals = {
        "c. rounds over a plain loop": ("plain.py",),
        "c. rounds over OpenFedLLM's loop": ("openfedllm.py",),
    }
    if find_spec("nvflare") is not None:
        rivals["c. rounds over NVIDIA FLARE's simulator"] = ("flare.py",)
    if find_spec("pfl") is not None:
        rivals["c. rounds over pfl-research"] = ("pfl_research.py",)
    for what, kind, batch in (
        (f"MiniLM, {CLIENTS} clients, batch 8", "encoder", 8),
        (f"decoder, {CLIENTS} clients, batch 4", "decoder", 4),
    ):
        with made(kind, CLIENTS, STEPS, batch) as folder:
            yield from compared(folder, what, rivals, {}, REPEATS)

"""Row compile: training steps of a plain program with ``torch.compile`` against those without."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from setting import Plain, engine
from timing import Row, faster, race, seconds


def rows() -> Iterator[Row]:
    """g. Steps of a compiled model against the same model; processor time, with its start-up."""
    ours = engine(1, 32, "training.batch_size=8", "training.clients_per_batch=1")
    examples = ours.clients[0].train.tolist()
    plain, compiled = Plain(ours), Plain(ours)
    compiled.model = torch.compile(compiled.model)
    before = time.process_time()
    compiled.train(examples)
    spent = time.process_time() - before
    taken = race(
        {"compiled": lambda: compiled.train(examples), "as it is": lambda: plain.train(examples)},
        9,
        clock=time.process_time,
    )
    what = f"g. four steps, compiled over as it is; batch 8; compilation took {seconds(spent)}"
    yield faster(what, taken, "compiled", "as it is")

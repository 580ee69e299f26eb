"""Parts of the GPU benchmark: each yields its rows as they are measured."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import decoder
import plain_llama
import random_llama
import torch
from server import rows as server_rows
from setting import rounds
from timing import Row, faster, race

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.estimate import estimate, load_config
from fedmerge_peft.training.evaluation import evaluate


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured."""

    device: str
    dtype: str
    precision: str
    decoders: Mapping[str, Mapping[str, int]]
    """Sizes of the decoders, by name."""
    large: Mapping[str, int]
    """Decoder for QLoRA."""
    optimizer: str
    """Optimizer for QLoRA."""
    counts: Sequence[int]
    """Clients in one pass."""
    batches: Sequence[int]
    """Batch sizes, the most important first."""
    qlora: Sequence[tuple[int, int]]
    """Batch sizes and clients in one pass for QLoRA."""
    length: int
    """Tokens of an example."""
    steps: int
    """Optimizer steps of a client and round."""
    repeats: int
    server: tuple[int, int, int, int]
    """Arguments of ``server.rows``."""


def _sizes(width: int, layers: int, heads: int, key_value_heads: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": inner,
        "vocab_size": 49_152,
    }


GPU = Scale(
    device="cuda",
    dtype="bfloat16",
    precision="bf16",
    decoders={
        "100 M": _sizes(576, 21, 9, 3, 1536),
        "1 B": _sizes(2048, 18, 32, 8, 6144),
    },
    large=random_llama.LLAMA_3_8B,
    optimizer="paged_adamw_8bit",
    counts=(1, 2, 4, 8, 16, 32),
    batches=(4, 1, 8),
    qlora=((1, 1), (1, 4), (1, 8), (8, 1)),
    length=64,
    steps=2,
    repeats=3,
    server=(1000, 100, 10_000, 25),
)
TINY = Scale(
    device="cpu",
    dtype="float32",
    precision="no",
    decoders={"tiny": {**_sizes(32, 3, 4, 2, 64), "vocab_size": 400}},
    large={**_sizes(64, 2, 4, 2, 128), "vocab_size": 400, "tie_word_embeddings": False},
    optimizer="adamw_8bit",
    counts=(1, 2),
    batches=(1,),
    qlora=((1, 1), (1, 2)),
    length=16,
    steps=1,
    repeats=1,
    server=(50, 4, 16, 5),
)


class Bench:
    """Engines on the decoders of a scale."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale = scale
        self._folder = folder
        self._held = 0
        """Bytes on the GPU before the last engine was loaded."""

    def engine(
        self,
        sizes: Mapping[str, int],
        clients: int,
        tests: int = 0,
        last: int | None = None,
        labeled: int | None = None,
        steps: int | None = None,
        backbone: Mapping[str, Any] | None = None,
        **training: Any,
    ) -> LocalEngine:
        """Return an engine whose clients have the examples of their steps at the largest batch.

        Args:
            sizes: Sizes of the decoder.
            clients: Number of clients.
            tests: Test examples of each.
            last: Number of layers with adapters; None for all.
            labeled: Tokens of an example with a loss; a quarter by default.
            steps: Optimizer steps of a client and round; those of the scale by default.
            backbone: Further keys of the recipe's ``backbone``.
            training: Further keys of the recipe's ``training``.
        """
        scale, batch = self.scale, max(self.scale.batches)
        steps = steps or scale.steps
        dtype = getattr(torch, scale.dtype)
        folder = self._folder / "-".join(str(value) for value in sizes.values())
        model = random_llama.write(folder, sizes, dtype, scale.device)
        gc.collect()
        if scale.device == "cuda":
            torch.cuda.empty_cache()
            self._held = torch.cuda.memory_allocated()
        return decoder.load(
            model,
            clients,
            batch * steps,
            tests,
            last,
            length=scale.length,
            labeled=labeled or scale.length // 4,
            backbone={"dtype": scale.dtype, **(backbone or {})},
            training={
                "device": scale.device,
                "mixed_precision": scale.precision,
                "batch_size": batch,
                "steps": steps,
                "prefix_disk": 0,
                **training,
            },
            evaluation={"every": 100_000, "finetuned": False},
            rounds=100_000,
        )

    def finished(self, work: Callable[[], object]) -> None:
        """Do something, and wait for the device."""
        work()
        if self.scale.device == "cuda":
            torch.cuda.synchronize()

    def race(
        self, sides: Mapping[str, Callable[[], object]], warm: bool = True
    ) -> dict[str, list[float]]:
        waiting = {name: partial(self.finished, work) for name, work in sides.items()}
        return race(waiting, self.scale.repeats, warm)

    def peak(self, work: Callable[[], object]) -> float:
        """Return the bytes on the GPU at the peak of a call since the last engine was loaded.

        On a CPU, it is nan: a process of tiny models consists of its libraries.
        """
        if self.scale.device != "cuda":
            work()
            return math.nan
        torch.cuda.reset_peak_memory_stats()
        self.finished(work)
        return float(torch.cuda.max_memory_allocated() - self._held)

    def memory(self, what: str, engine: LocalEngine, measured: float) -> Row:
        """Return the row of the estimated peak of training over a measured one."""
        config, device = load_config(engine.recipe.backbone), self.scale.device
        found = estimate(engine.recipe, config, length=self.scale.length, device=device)
        estimated = found.backbone + found.adapters + found.training
        sides = f"estimated {gigabytes(estimated)}, measured {gigabytes(measured)}"
        if math.isnan(measured):
            sides = f"estimated {estimated / 1e6:.3g} MB, not measured on a CPU"
        ratio = estimated / measured
        return Row(
            f"{what}: estimate over measured peak", ratio, ratio, ratio, sides, "0.85 to 1.15"
        )


def gigabytes(value: float) -> str:
    """Format a number of bytes."""
    return "memory not measured" if math.isnan(value) else f"{value / 1e9:.2f} GB"


def _sharing(engine: LocalEngine, batch: int, together: int) -> LocalEngine:
    """Return an engine on the same model that trains ``together`` clients in each pass.

    Raises:
        RuntimeError: The trial of a shared pass has failed; the log has the reason.
    """
    own = engine.with_recipe(
        engine.recipe.replace(
            [f"training.batch_size={batch}", f"training.clients_per_batch={together}"]
        )
    )
    assert own is not None
    if own.clients_per_batch != together:
        raise RuntimeError(f"the trial of a pass of {together} clients failed: they train alone")
    return own


def _round(engine: LocalEngine, together: int) -> Callable[[], object]:
    """Return a function that runs a round with ``together`` clients in each pass."""
    iterator = rounds(engine).rounds()

    def work() -> None:
        next(iterator)
        if engine.clients_per_batch != together:
            raise MemoryError(f"{together} clients do not fit into memory")

    return work


def qlora(bench: Bench) -> Iterator[Row]:
    """QLoRA with gradient checkpointing, by batch size and clients in one pass; a Trainer last."""
    scale = bench.scale
    clients = max(together for _, together in scale.qlora)
    loaded = bench.engine(
        scale.large,
        clients,
        labeled=scale.length - 3,
        backbone={"quantization": "4bit", "gradient_checkpointing": True},
        optimizer=scale.optimizer,
        clients_per_batch=1,
    )
    engines, works, peaks = {}, {}, {}
    for batch, together in scale.qlora:
        side = f"batch {batch}, K = {together}"
        engines[side] = _sharing(loaded, batch, together)
        works[side] = _round(engines[side], together)
        peaks[side] = bench.peak(works[side])
    sizes = [batch for batch, _ in scale.qlora]
    taken = bench.race(works, warm=False)
    tokens = {
        side: clients * scale.steps * batch * scale.length
        for side, batch in zip(works, sizes, strict=True)
    }
    first, *others = works
    for side in others:
        ratios = [
            tokens[side] / tokens[first] * one / other
            for one, other in zip(taken[first], taken[side], strict=True)
        ]
        details = ", ".join(
            f"{name} {tokens[name] / median(taken[name]):,.0f} tokens/s and "
            f"{gigabytes(peaks[name])}"
            for name in (side, first)
        )
        yield Row.of(f"4 bits: {side} over {first}, tokens a second", ratios, details)
    for side, engine in engines.items():
        yield bench.memory(f"4 bits, {side}", engine, peaks[side])
    alone = _sharing(loaded, batch := max(sizes), 1)
    programs = {"Trainer": plain_llama.trainer}
    yield from _against_plain(bench, f"4 bits, batch {batch}", alone, batch, programs)


def overhead(bench: Bench) -> Iterator[Row]:
    """Rounds of one client at a time against a loop with Accelerate, and against a Trainer."""
    programs = {"loop with Accelerate": plain_llama.loop, "Trainer": plain_llama.trainer}
    for name, sizes in bench.scale.decoders.items():
        batch = max(bench.scale.batches)
        engine = bench.engine(sizes, 4, steps=4 * bench.scale.steps, clients_per_batch=1)
        yield from _against_plain(bench, f"{name}, batch {batch}", engine, batch, programs)


def _against_plain(
    bench: Bench,
    what: str,
    engine: LocalEngine,
    batch: int,
    programs: Mapping[str, Callable[[LocalEngine, int], Callable[[], object]]],
) -> Iterator[Row]:
    """Rounds of one client at a time against plain programs that train on the same examples."""
    examples = sum(len(client.train) for client in engine.clients)
    trained = len(engine.clients) * (engine.recipe.training.steps or 0) * batch
    if examples != trained:
        raise ValueError(f"a round trains on {trained} examples, and an epoch on {examples}")
    sides = {"rounds": _round(engine, 1)}
    sides |= {name: make(engine, batch) for name, make in programs.items()}
    taken = bench.race(sides)
    speeds = {
        side: f"{side} {trained * bench.scale.length / median(each):,.0f} tokens/s"
        for side, each in taken.items()
    }
    for name in programs:
        wanted = "≥ 0.98" if name == "loop with Accelerate" else ""
        row = faster(f"{what}: rounds over a {name}", taken, "rounds", name, wanted)
        details = f"{speeds['rounds']}, {speeds[name]}"
        yield Row(row.what, row.ratio, row.low, row.high, details, row.wanted)


def together(bench: Bench) -> Iterator[Row]:
    """K clients in one pass against one at a time, with the peak of memory."""
    scale = bench.scale
    for name, sizes in scale.decoders.items():
        engine = bench.engine(sizes, max(scale.counts), clients_per_batch=1)
        for batch in scale.batches:
            sides: dict[str, Callable[[], object]] = {}
            peaks: dict[str, float] = {}
            for count in scale.counts:
                try:
                    work = _round(_sharing(engine, batch, count), count)
                    peaks[f"K = {count}"] = bench.peak(work)
                except (MemoryError, torch.OutOfMemoryError):
                    break
                sides[f"K = {count}"] = work
            taken = bench.race(sides, warm=False)
            tokens = max(scale.counts) * scale.steps * batch * scale.length
            details = {
                side: f"{side} {tokens / median(each):,.0f} tokens/s, {gigabytes(peaks[side])}"
                for side, each in taken.items()
            }
            for side in list(sides)[1:]:
                wanted = "≥ 4" if (name, batch, side) == ("100 M", 4, "K = 8") else ""
                what = f"{name}, batch {batch}: {side} over K = 1"
                row = faster(what, taken, side, "K = 1", wanted)
                shown = f"{details[side]}; {details['K = 1']}"
                yield Row(what, row.ratio, row.low, row.high, shown, wanted)


def memory(bench: Bench) -> Iterator[Row]:
    """Estimated memory over the measured peak; nearly all tokens have a loss, as is assumed."""
    scale = bench.scale
    for name, sizes in scale.decoders.items():
        counts = [count for count in (1, 8) if count <= max(scale.counts)]
        labeled = scale.length - 3
        engine = bench.engine(sizes, max(counts), labeled=labeled, clients_per_batch=1)
        for count in counts:
            own = _sharing(engine, scale.batches[0], count)
            peak = bench.peak(_round(own, count))
            yield bench.memory(f"{name}, batch {scale.batches[0]}, K = {count}", own, peak)


def prefix(bench: Bench) -> Iterator[Row]:
    """LoRA on the last third of the layers: cached states of the frozen layers, or computed."""
    for name, sizes in bench.scale.decoders.items():
        last, batch = max(1, sizes["num_hidden_layers"] // 3), max(bench.scale.batches)
        options = {"last": last, "clients_per_batch": 1}
        sides = {
            side: _round(bench.engine(sizes, 4, prefix_cache=gb, **options), 1)
            for side, gb in (("cached", 8), ("recomputed", 0))
        }
        yield faster(
            f"{name}: LoRA on the last {last} layers, cached prefix over recomputed; batch {batch}",
            bench.race(sides),
            "cached",
            "recomputed",
            "≥ 2",
        )


def evaluation(bench: Bench) -> Iterator[Row]:
    """Evaluation with logits at the labeled quarter of the positions, or at all."""
    for name, sizes in bench.scale.decoders.items():
        engine = bench.engine(sizes, 1, tests=4 * max(bench.scale.batches))
        runtime, rows = engine.runtime, engine.clients[0].test
        row, head = engine.strategy_context().fresh_row(0), engine.runtime.head

        def score(
            labeled: bool,
            runtime: Any = runtime,
            row: Any = row,
            rows: Any = rows,
            head: Any = head,
        ) -> None:
            runtime.head = head if labeled else None
            evaluate(runtime, row, rows, len(rows))

        sides = {"labeled": partial(score, True), "all": partial(score, False)}
        peaks = ", ".join(f"{side} {gigabytes(bench.peak(work))}" for side, work in sides.items())
        what = f"{name}: evaluation, labeled positions over all"
        found = faster(what, bench.race(sides), "labeled", "all", "≥ 2")
        yield Row(found.what, found.ratio, found.low, found.high, f"{found.sides}; {peaks}", "≥ 2")


def server(bench: Bench) -> Iterator[Row]:
    """The server step of FedMerge, on the CPU."""
    yield from server_rows(*bench.scale.server)

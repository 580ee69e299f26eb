"""Measure speed on one GPU, on random decoders: rounds, clients in one pass, memory, QLoRA.

    benchmarks/speed/gpu.sh                 # all parts, in less than ten minutes
    benchmarks/speed/gpu.sh --tiny          # tiny models on the CPU, as the tests run it

A part that needs more time than is left is skipped, which the page states.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import decoder
import server
import torch
from pages import stamp
from setting import rounds
from timing import Row, faster, race, seconds

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training.evaluation import evaluate


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured."""

    device: str
    dtype: str
    precision: str
    decoders: Mapping[str, Mapping[str, int]]
    """Sizes of the decoders, by name; the first one is used for single measurements."""
    large: Mapping[str, int]
    """Decoder for QLoRA, of 8 B on a GPU."""
    counts: Sequence[int]
    """Clients in one pass."""
    batches: Sequence[int]
    length: int
    """Tokens of an example."""
    steps: int
    """Optimizer steps of a client and round."""
    repeats: int


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
    large=_sizes(4096, 32, 32, 8, 14_336),
    counts=(1, 2, 4, 8, 16, 32),
    batches=(1, 4, 8),
    length=64,
    steps=2,
    repeats=3,
)
TINY = Scale(
    device="cpu",
    dtype="float32",
    precision="no",
    decoders={"tiny": {**_sizes(32, 3, 4, 2, 64), "vocab_size": 400}},
    large={**_sizes(64, 2, 4, 2, 128), "vocab_size": 400},
    counts=(1, 2),
    batches=(1,),
    length=16,
    steps=1,
    repeats=1,
)


class Bench:
    """Engines on the decoders of a scale."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale = scale
        self._folder = folder

    def engine(
        self,
        sizes: Mapping[str, int],
        clients: int,
        batch: int,
        tests: int = 0,
        last: int | None = None,
        backbone: Mapping[str, Any] | None = None,
        **training: Any,
    ) -> LocalEngine:
        """Return an engine whose clients train ``steps`` steps in a round."""
        scale = self.scale
        model = self._folder / "-".join(str(value) for value in sizes.values())
        if not model.exists():
            with torch.device(scale.device):
                decoder.write(model, sizes, getattr(torch, scale.dtype))
        return decoder.load(
            str(model),
            clients,
            batch * scale.steps,
            tests,
            last,
            length=scale.length,
            labeled=scale.length // 4,
            backbone={"dtype": scale.dtype, **(backbone or {})},
            training={
                "device": scale.device,
                "mixed_precision": scale.precision,
                "batch_size": batch,
                "steps": scale.steps,
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

    def race(self, sides: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        waiting = {name: partial(self.finished, work) for name, work in sides.items()}
        return race(waiting, self.scale.repeats)

    def peak(self, work: Callable[[], object]) -> float:
        """Return the GPU memory in bytes that a call needs at most; 0 on a CPU."""
        if self.scale.device != "cuda":
            work()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        self.finished(work)
        return float(torch.cuda.max_memory_allocated())


def _round(engine: LocalEngine, together: int) -> Callable[[], object]:
    """Return a function that runs a round with ``together`` clients in each pass."""
    iterator = rounds(engine).rounds()

    def work() -> None:
        engine.clients_per_batch = together
        next(iterator)
        if engine.clients_per_batch != together:
            raise MemoryError(f"{together} clients do not fit into memory")

    return work


def overhead(bench: Bench) -> Iterator[Row]:
    """Rounds of one client at a time against a plain loop with PEFT and Accelerate."""
    scale = bench.scale
    for name, sizes in scale.decoders.items():
        batch, clients = max(scale.batches), 4
        engine = bench.engine(sizes, clients, batch, last=None)
        plain = _plain_loop(engine, batch)
        taken = bench.race({"rounds": _round(engine, 1), "plain loop": plain})
        tokens = clients * scale.steps * batch * scale.length
        what = f"{name}: rounds over a plain loop; batch {batch}"
        row = faster(what, taken, "rounds", "plain loop", "≥ 0.95")
        speeds = ", ".join(
            f"{side} {tokens / median(each):,.0f} tokens/s" for side, each in taken.items()
        )
        yield Row(row.what, row.ratio, row.low, row.high, speeds, row.wanted)


def _plain_loop(engine: LocalEngine, batch: int) -> Callable[[], object]:
    """Return a function that trains on all examples of an engine, as the guides of PEFT do."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader, default_collate
    from transformers import AutoModelForCausalLM

    recipe, columns = engine.recipe, engine.runtime.examples.columns
    loaded = AutoModelForCausalLM.from_pretrained(
        recipe.backbone.model, dtype=getattr(torch, recipe.backbone.dtype)
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        target_modules=list(recipe.lora.target_modules or []),
    )
    accelerator = Accelerator(
        cpu=recipe.training.device == "cpu", mixed_precision=recipe.training.mixed_precision
    )
    model = get_peft_model(loaded, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    examples = [
        {name: columns[name][row] for name in ("input_ids", "labels")}
        for client in engine.clients
        for row in client.train
    ]
    loader = DataLoader(examples, batch, shuffle=True, collate_fn=default_collate)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, 1e-3), loader)
    model.train()

    def epoch() -> None:
        for inputs in loader:
            accelerator.backward(model(**inputs).loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def together(bench: Bench) -> Iterator[Row]:
    """K clients in one pass against one at a time, with the largest use of memory."""
    scale = bench.scale
    for name, sizes in scale.decoders.items():
        for batch in scale.batches:
            engine = bench.engine(sizes, max(scale.counts), batch)
            sides: dict[str, Callable[[], object]] = {}
            peaks: dict[str, float] = {}
            for count in scale.counts:
                work = _round(engine, count)
                try:
                    peaks[f"K = {count}"] = bench.peak(work)
                except (MemoryError, torch.OutOfMemoryError):
                    break
                sides[f"K = {count}"] = work
            taken = bench.race(sides)
            tokens = max(scale.counts) * scale.steps * batch * scale.length
            details = {
                side: f"{tokens / median(each):,.0f} tokens/s, {peaks[side] / 1e9:.2f} GB"
                for side, each in taken.items()
            }
            for side in list(sides)[1:]:
                wanted = "≥ 4" if (name, batch, side) == ("100 M", 4, "K = 8") else ""
                what = f"{name}, batch {batch}: {side} over K = 1"
                row = faster(what, taken, side, "K = 1", wanted)
                shown = f"{details[side]}; K = 1 {details['K = 1']}"
                yield Row(what, row.ratio, row.low, row.high, shown, wanted)


def prefix(bench: Bench) -> Iterator[Row]:
    """LoRA on the last third of the layers: cached states of the frozen layers, or computed."""
    for name, sizes in bench.scale.decoders.items():
        last, batch = max(1, sizes["num_hidden_layers"] // 3), max(bench.scale.batches)
        sides = {
            side: _round(bench.engine(sizes, 4, batch, last=last, prefix_cache=gigabytes), 1)
            for side, gigabytes in (("cached", 8), ("recomputed", 0))
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
        tests = 4 * max(bench.scale.batches)
        engine = bench.engine(sizes, 1, 1, tests=tests)
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
        peaks = ", ".join(f"{side} {bench.peak(work) / 1e9:.2f} GB" for side, work in sides.items())
        what = f"{name}: evaluation, labeled positions over all"
        found = faster(what, bench.race(sides), "labeled", "all")
        yield Row(found.what, found.ratio, found.low, found.high, f"{found.sides}; {peaks}")


def server_step(bench: Bench) -> Iterator[Row]:
    """The server step of FedMerge, on the CPU."""
    if bench.scale.device == "cuda":
        yield from server.rows()


def qlora(bench: Bench) -> Iterator[Row]:
    """QLoRA, four clients: tokens a second and memory, by batch size and clients in one pass."""
    if find_spec("bitsandbytes") is None:
        return
    small, large = bench.scale.batches[0], bench.scale.batches[-1]
    works, peaks, tokens = {}, {}, {}
    for batch, together in ((small, 1), (large, 1), (small, 4)):
        engine = bench.engine(
            bench.scale.large,
            4,
            batch,
            backbone={"quantization": "4bit"},
            clients_per_batch=together,
        )
        side = f"batch {batch}, {together} in one pass"
        works[side] = _round(engine, together)
        peaks[side] = bench.peak(works[side])
        tokens[side] = 4 * bench.scale.steps * batch * bench.scale.length
    taken = bench.race(works)
    speeds = {side: tokens[side] / median(taken[side]) for side in works}
    first, *others = speeds
    for side in others:
        ratio = speeds[side] / speeds[first]
        details = ", ".join(
            f"{name} {speeds[name]:,.0f} tokens/s and {peaks[name] / 1e9:.1f} GB"
            for name in (side, first)
        )
        yield Row(f"4 bits: {side}, over {first}", ratio, ratio, ratio, details)


PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "together": (together, 150),
    "overhead": (overhead, 40),
    "prefix": (prefix, 40),
    "evaluation": (evaluation, 30),
    "server": (server_step, 90),
    "qlora": (qlora, 150),
}
"""Measurements, the most important first, and the seconds that must be left for each."""
_HEAD = "| row | ratio | range | medians | target |\n|---|---|---|---|---|\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--seconds", type=float, default=560, help="time limit; default: 560")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="page to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; --tiny measures tiny models on the CPU")
    begin = time.monotonic()
    warnings.filterwarnings("ignore", category=FutureWarning)
    scale = TINY if options.tiny else GPU
    device = "CPU" if options.tiny else torch.cuda.get_device_name()
    page = f"# Speed on one device: {device}\n"
    with TemporaryDirectory() as folder:
        bench = Bench(scale, Path(folder))
        for name in options.parts or PARTS:
            part, needed = PARTS[name]
            page += f"\n## {name}\n\n{part.__doc__}\n\n"
            if time.monotonic() - begin + needed > options.seconds:
                page += "Skipped: not enough time is left.\n"
            else:
                started = time.monotonic()
                lines = []
                for row in part(bench):
                    print(row, flush=True)
                    lines.append(f"{row}\n")
                page += _HEAD + "".join(lines) if lines else "Not measured with this setup.\n"
                page += f"\nMeasured in {seconds(time.monotonic() - started)}.\n"
            options.out.write_text(f"{page}\n{stamp()}\n", encoding="utf-8")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

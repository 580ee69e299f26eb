"""Rows f: the start-up time of commands against an import of torch, and of the first step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

import shares
from timing import Row, faster, race, seconds

_CALL = "from fedmerge_peft.cli import main; main({!r})"
EXAMPLES = 8
COMMANDS = {
    "--help": ("≤ 0.4 s", ["--help"]),
    "ls": ("", ["ls"]),
    "validate": ("≤ 0.8 s", ["validate", "quickstart"]),
}


def rows() -> Iterator[Row]:
    """f. Start-up: commands that load no model, against `python -c "import torch"`."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL
        )

    taken = race(
        {
            "python": run(""),
            "import torch": run("import torch"),
            **{name: run(_CALL.format(call)) for name, (_, call) in COMMANDS.items()},
        },
        7,
    )
    for name, (wanted, _) in COMMANDS.items():
        ratios = [
            torch / ours for torch, ours in zip(taken["import torch"], taken[name], strict=True)
        ]
        sides = ", ".join(
            f"{each} {seconds(median(taken[each]))}" for each in (name, "import torch", "python")
        )
        yield Row.of(f"f. `fedmerge {name}`", ratios, sides, wanted)


def first_step(repeats: int = 5) -> Iterator[Row]:
    """f. From the start of a process to the end of the first training step on MiniLM, batch 8."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}

    def run(side: str) -> Callable[[], object]:
        return lambda: runs[side].append(shares.run([sys.executable, __file__, side]))

    taken = race({"ours": run("ours"), "plain loop": run("plain")}, repeats)
    yield faster(
        "f. the first training step, over a plain PEFT + Accelerate program's",
        taken,
        "ours",
        "plain loop",
        "≥ 0.91",
    )
    for name, side in (("this package", "ours"), ("the plain program", "plain")):
        yield shares.row(f"f. parts of {name}", runs[side][1:])  # the first one warms the disk


LIBRARIES = (
    "accelerate",
    "datasets",
    "peft",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
)


def _ours(begin: str) -> None:
    parts = shares.Shares(float(begin), "imports")
    shares.import_libraries("setting", *LIBRARIES)
    from setting import engine

    from fedmerge_peft.engines.assignments import Assignment
    from fedmerge_peft.training.plan import Train

    with parts.part(shares.REST):
        shares.watch_engine(parts)
        loaded = engine(1, EXAMPLES, f"training.batch_size={EXAMPLES}", "training.steps=1")
        assignment = Assignment(Train(loaded.strategy_context().fresh_row(0)))
        next(loaded.train_clients(1, [(0, assignment)]))
        shares.report(parts)


def _plain(begin: str) -> None:
    """Run the first step of a program that follows the guides of PEFT and Accelerate."""
    parts = shares.Shares(float(begin), "imports")
    shares.import_libraries(*LIBRARIES)
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedmerge_peft.models.pretrained import model_folder
    from fedmerge_peft.recipe.backbone import BackboneRecipe

    with TemporaryDirectory() as scratch:
        model_name = "sentence-transformers/all-MiniLM-L6-v2"
        with parts.part("model"):
            folder = model_folder(BackboneRecipe(model=model_name), Path(scratch))
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        with parts.part("tokens"):
            tokenizer = AutoTokenizer.from_pretrained(folder)
    table = Dataset.from_dict(
        {"text": ["order parcel refund " * 13] * EXAMPLES, "labels": [0, 1] * (EXAMPLES // 2)}
    )
    with parts.part("tokens"):
        table = table.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=32),
            batched=True,
            remove_columns="text",
        )
    with parts.part("model"):
        accelerator = Accelerator(cpu=True)
        config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3
    )
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(table.with_format("torch"), EXAMPLES)
    )
    with parts.part("training"):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
    shares.report(parts)


if __name__ == "__main__":
    {"ours": _ours, "plain": _plain}[sys.argv[1]](*sys.argv[2:])

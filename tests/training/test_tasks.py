"""A step of each task equals one of transformers' Trainer."""

import numpy as np
import pytest
import torch

from tasks.made_examples import KINDS, MADE
from training.prefix_bench import ROWS

TASKS = sorted(MADE)
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
OPTIMIZERS = {"multiple-choice": ("sgd", SGD)}
"""AdamW would scale the gradient of a bias that all choices share: zero up to rounding."""


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("task", TASKS)
def test_a_step_equals_one_of_transformers_trainer(make_bench, task, tmp_path):
    from transformers import Trainer, TrainingArguments

    optimizer, own = OPTIMIZERS.get(task, ("adamw_torch", {}))
    bench = make_bench(
        f"{KINDS[task]}-{task}",
        batch_size=len(ROWS),
        max_grad_norm=None,
        cached=False,
        lora={"dropout": 0.0},
        **own,
    )
    for module in bench.backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = bench.train()
    bench.backbone.load_row(bench.row)
    rows = [{"row": row} for row in ROWS.tolist()]
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim=optimizer,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(
        bench.backbone.model,
        settings,
        train_dataset=rows,
        data_collator=lambda batch: bench.task.collate(
            bench.examples, np.array([each["row"] for each in batch])
        ),
    ).train()
    held = bench.backbone.row()
    assert held.dtype == torch.float64
    assert (trained - held).norm() <= 1e-10 * (held - bench.row).norm()

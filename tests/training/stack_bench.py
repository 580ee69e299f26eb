"""A tiny model, and four jobs that differ in every option of a job."""

import numpy as np
import torch
from torch import nn

from fedmerge_peft import Recipe
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.batching import clients_per_batch
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache
from fedmerge_peft.training.runtime import Runtime
from oracle import train_plainly

COUNT = 16
ROWS = np.arange(COUNT)
SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}
TARGETS = {
    "bert": ["query", "value"],
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["q_proj", "fc1"],
    "resnet": ["convolution"],
    "mixtral": ["q_proj", "o_proj"],
}


class Bench:
    """A tiny model without dropout, and four jobs that differ in every option of a job."""

    def __init__(
        self,
        folder,
        table_and_task,
        kind="bert",
        lora=None,
        backbone=None,
        cached=False,
        dropout=False,
        **training,
    ):
        training = {"learning_rate": 0.01, **training}
        table, task = table_and_task(kind, COUNT)
        model = folder / kind.partition("-")[0]
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": str(model), **(backbone or {})},
                "lora": {"r": 2, "target_modules": TARGETS[model.name], **(lora or {})},
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {"batch_size": 2, "epochs": 1, "device": "cpu", **training},
            }
        )
        self.accelerator = make_accelerator(self.recipe.training)
        self.task = make_task(self.recipe, table, str(model))
        self.backbone = load_backbone(
            self.recipe.backbone, self.recipe.lora, self.task, str(model), torch.device("cpu"), 0
        )
        for module in self.backbone.model.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        self.examples = self.task.encode(table)
        self.cache = (
            PrefixCache(self.backbone, self.task, self.examples, [ROWS], 1.0) if cached else None
        )

    def row(self, seed):
        """An adapter with no factor at zero, ``(P,)``."""
        row = self.backbone.fresh_row(seed)
        return row + 0.1 * torch.randn(len(row), generator=torch.Generator().manual_seed(seed))

    def jobs(self):
        """7, 5, 3 and 5 examples; an anchor, example weights, two phases of some columns."""
        head = torch.zeros(self.backbone.layout.size, dtype=torch.bool)
        head[: len(head) // 3] = True
        plans = [
            Train(self.row(0)),
            Train(self.row(1), proximal=0.5, anchor=self.row(9)),
            Train(self.row(2), example_weights=torch.tensor([0.3, 0.0, 2.0])),
            Train(self.row(3), phases=(head, ~head)),
        ]
        indices = [ROWS[:7], ROWS[7:12], ROWS[[12, 3, 8]], ROWS[11:]]
        return [
            Job(plan, rows, 100 + number)
            for number, (plan, rows) in enumerate(zip(plans, indices, strict=True))
        ]

    @property
    def runtime(self):
        return Runtime(self.backbone, self.task, self.accelerator, self.examples, self.cache)

    def plainly(self, jobs):
        return [train_plainly(self.runtime, self.recipe.training, job) for job in jobs]

    def alone(self, jobs):
        return [train(self.runtime, self.recipe.training, [job])[0] for job in jobs]

    def together(self, jobs):
        return train(self.runtime, self.recipe.training, jobs)

    def count(self, **changes):
        training = self.recipe.training.model_copy(update=changes)
        return clients_per_batch(self.runtime, training, ROWS)

"""One client on a tiny model of four layers, of which the first two are frozen."""

import numpy as np
import torch
from torch import nn

from fedmerge_peft import Recipe
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache
from fedmerge_peft.training.runtime import Runtime

COUNT = 12
ROWS = np.arange(COUNT)
TARGETS = {
    "bert": ["query", "value"],
    "llama": ["q_proj"],
    "gpt2": ["c_attn"],
    "vit": ["q_proj", "v_proj"],
}


class Bench:
    """One client on a tiny model of four layers, whose last two have adapters."""

    def __init__(
        self,
        folder,
        table_and_task,
        kind="bert",
        lora=None,
        backbone=None,
        metrics=None,
        cached=True,
        gigabytes=1.0,
        disk=None,
        dtype=None,
        **training,
    ):
        table, task = table_and_task(kind, COUNT)
        if task["name"] == "causal-lm":
            task |= {"metrics": metrics or ["perplexity", "accuracy"], "max_new_tokens": 4}
        model = folder / kind.partition("-")[0]
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": str(model), **(backbone or {})},
                "lora": {
                    "r": 2,
                    "dropout": 0.1,
                    "target_modules": TARGETS[model.name],
                    "layers_to_transform": [2, 3],
                    **(lora or {}),
                },
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {
                    "batch_size": 4,
                    "epochs": 1,
                    "learning_rate": 0.01,
                    "device": "cpu",
                    **training,
                },
            }
        )
        self.accelerator = make_accelerator(self.recipe.training)
        self.task = make_task(self.recipe, table, str(model))
        self.backbone = load_backbone(
            self.recipe.backbone, self.recipe.lora, self.task, str(model), torch.device("cpu"), 0
        )
        self.examples = self.task.encode(table)
        self.row = self.backbone.fresh_row(1)
        self.cache = (
            PrefixCache(self.backbone, self.task, self.examples, [ROWS], gigabytes, disk, dtype)
            if cached
            else None
        )

    @property
    def runtime(self):
        return Runtime(self.backbone, self.task, self.accelerator, self.examples, self.cache)

    def train(self, seed=3):
        job = Job(Train(self.row), ROWS, seed)
        return train(self.runtime, self.recipe.training, [job])[0].row

    def evaluate(self, served, indices=ROWS, batch_size=5):
        return evaluate(self.runtime, served, indices, batch_size)

    def losses(self, row, indices=ROWS):
        return example_losses(self.runtime, row, indices, 5)

    def count(self, layer, call):
        """Return the number of runs of a layer during ``call()``, and the result of the call."""
        runs = []
        part = next(
            module
            for module in self.backbone.model.get_submodule(layer).modules()
            if isinstance(module, nn.LayerNorm)
        )
        handle = part.register_forward_hook(lambda *_: runs.append(1))
        result = call()
        handle.remove()
        return len(runs), result

    @property
    def used(self):
        return self.cache.used

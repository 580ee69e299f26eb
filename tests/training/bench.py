"""One client on a tiny model without dropout."""

import numpy as np
import torch
from datasets import Dataset

from fedmerge_peft import Recipe
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.evaluation import evaluate
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.runtime import Runtime

WORDS = ["parcel", "refund", "password", "laptop", "invoice", "badge", "heating"]
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}


class Bench:
    """One client on a tiny BERT without dropout, so that steps can be recomputed."""

    def __init__(self, folder, kind="bert", **training):
        count = 10
        if kind == "bert":
            self.table = Dataset.from_dict(
                {
                    "text": [
                        f"the {WORDS[n % 7]} {'is late ' * (n % 4)}again" for n in range(count)
                    ],
                    "label": [n % 3 for n in range(count)],
                }
            )
            task = {"name": "sequence-classification"}
        else:
            self.table = Dataset.from_dict(
                {
                    "prompt": [f"say {WORDS[n % 7]}" for n in range(count)],
                    "completion": [" yes" * (1 + n % 5) for n in range(count)],
                }
            )
            task = {"name": "causal-lm"}
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": str(folder / kind)},
                "lora": {
                    "r": 2,
                    "target_modules": TARGETS[kind],
                },
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {
                    "batch_size": 4,
                    "epochs": 1,
                    "learning_rate": 0.01,
                    "max_grad_norm": None,
                    **training,
                },
            }
        )
        self.accelerator = make_accelerator(self.recipe.training)
        self.task = make_task(self.recipe, self.table, str(folder / kind))
        self.backbone = load_backbone(
            self.recipe.backbone,
            self.recipe.lora,
            self.task,
            str(folder / kind),
            torch.device("cpu"),
            0,
        )
        for module in self.backbone.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.examples = self.task.encode(self.table)
        self.runtime = Runtime(self.backbone, self.task, self.accelerator, self.examples)
        self.row = self.backbone.fresh_row(1)

    def train(self, indices=None, seed=3, **job):
        indices = np.arange(len(self.table)) if indices is None else indices
        job = Job(Train(self.row, **job), indices, seed)
        return train(self.runtime, self.recipe.training, [job])[0]

    def evaluate(self, served, batch_size=4):
        indices = np.arange(len(self.table))
        return evaluate(self.runtime, served, indices, batch_size)

    def probabilities(self, row):
        """Probabilities of each label for each example, ``(10, 3)``."""
        self.backbone.load_row(row)
        batch = self.task.collate(self.examples, np.arange(len(self.table)))
        with torch.no_grad():
            return (
                self.backbone.model.eval()(**{k: v for k, v in batch.items() if k != "labels"})
                .logits.double()
                .softmax(1)
            )

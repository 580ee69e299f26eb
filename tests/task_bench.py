"""A task on a tiny model without dropout: its steps, and those of transformers and plain PEFT."""

import numpy as np
import torch
import transformers as hf
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict

from fedmerge_peft import Recipe, federate
from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.evaluation import evaluate
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.input_trial import try_inputs
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache
from fedmerge_peft.training.runtime import Runtime

RATE = 0.1


class TaskBench:
    """A task, its model with an adapter that is not zero, and its encoded examples."""

    def __init__(self, folder, table, task, lora, prefix_cache=False):
        self.folder = folder
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": str(folder)},
                "lora": {"r": 2, **lora},
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {
                    "batch_size": len(table),
                    "steps": 1,
                    "optimizer": "sgd",
                    "momentum": 0.0,
                    "weight_decay": 0.0,
                    "learning_rate": RATE,
                    "max_grad_norm": None,
                    "device": "cpu",
                },
            }
        )
        self.accelerator = make_accelerator(self.recipe.training)
        self.task = make_task(self.recipe, table, str(folder))
        self.backbone = load_backbone(
            self.recipe.backbone, self.recipe.lora, self.task, str(folder), torch.device("cpu"), 0
        )
        _without_dropout(self.backbone.model)
        try_inputs(self.task, self.backbone, self.accelerator, "the model")
        self.rows = np.arange(len(table))
        examples = self.task.encode(table)
        self.runtime = Runtime(self.backbone, self.task, self.accelerator, examples)
        if prefix_cache and self.backbone.prefix is not None:
            self.runtime.cache = PrefixCache(self.backbone, self.task, examples, [self.rows], 1.0)

    def row(self, seed=1):
        """An adapter none of whose factors is zero, ``(P,)``."""
        row = self.backbone.fresh_row(seed)
        return row + 0.05 * torch.randn(len(row), generator=torch.Generator().manual_seed(seed))

    def logits(self, rows=None):
        """The model's outputs for each of the examples, and their losses."""
        batch = self.runtime.collate(self.rows if rows is None else rows)
        labels, inputs = self.runtime.to_device(batch)
        with torch.no_grad():
            logits = self.task.forward(self.backbone.model.eval(), inputs)
        return logits, labels

    def trained(self, row, rows=None):
        """The adapter after one step on all examples, by name of PEFT."""
        job = Job(Train(row), self.rows if rows is None else rows, 0)
        (after,) = train(self.runtime, self.recipe.training, [job])
        return self.backbone.layout.state_dict(after.row)

    def plain_peft(self, row, folder):
        """The same model and adapter, loaded by transformers and PEFT alone."""
        config = self.backbone.config.to_dict()
        plain = {name: sorted(v) if isinstance(v, set) else v for name, v in config.items()}
        write_adapter(folder, self.backbone.layout.state_dict(row), plain)
        auto = getattr(hf, self.task.auto_model)
        options = {"num_labels": len(self.task.labels)} if self.task.labels else {}
        base = auto.from_pretrained(
            self.folder, dtype=torch.float64, **options, **self.task.config_options
        )
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True).double()
        return _without_dropout(model)

    def trained_by_transformers(self, model, dataset, collate, folder, trainer=hf.Trainer):
        """The adapter after one step of the ``Trainer`` on one batch, by name of PEFT."""
        arguments = hf.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=len(dataset),
            max_steps=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            weight_decay=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate).train()
        return get_peft_model_state_dict(model)

    def gradients(self, adapters, rows):
        """Gradients of adapters ``(K, P)`` on their own rows, in one pass and one at a time."""
        self.backbone.eval()
        stack = AdapterStack(self.backbone, adapters)
        with stack.applied():
            accumulate(self.runtime, stack, [[each] for each in rows])
        alone = []
        for adapter, own in zip(adapters, rows, strict=True):
            slot = AdapterSlot(self.backbone, adapter)
            accumulate(self.runtime, slot, [[own]])
            alone.append(slot.gradient[0].clone())
        return stack.gradient, torch.stack(alone)

    def scores(self, row, batch_size=4, rows=None):
        """The loss and the metrics of an adapter."""
        rows = self.rows if rows is None else rows
        return evaluate(self.runtime, row, rows, batch_size)


def assert_same_step(found, expected, start):
    """Two steps from the same adapter are the same within 1e-10 of their length."""
    assert found.keys() == expected.keys()
    error = max(float((found[name] - expected[name]).abs().max()) for name in found)
    moved = max(float((expected[name] - start[name]).abs().max()) for name in found)
    assert moved > 0
    assert error <= 1e-10 * max(1.0, moved)


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def run_of(folder, rows, task, **sections):
    """A run of two rounds with the clients of the column ``client``."""
    recipe = Recipe.model_validate(
        {
            "name": "task",
            "rounds": 2,
            "task": task,
            "data": {"path": "memory", "partition": {"scheme": "natural", "by": "client"}},
            "strategy": {"name": "fedmerge", "adapters": 2},
            "baselines": ["local"],
            **sections,
            "training": {
                "learning_rate": 1e-2,
                "batch_size": 2,
                "steps": 1,
                "device": "cpu",
                "clients_per_batch": 2,
                **sections.get("training", {}),
            },
        }
    )
    return federate(recipe, folder, data=Dataset.from_list(rows))

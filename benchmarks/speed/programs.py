"""What the programs of other frameworks have in common: PEFT and transformers, as in guides.

This module imports nothing of this package, so that its start-up is not part of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = Mapping[str, Tensor]
START = "start.safetensors"
"""File with the adapter before the first round."""
EXAMPLES = "examples.safetensors"
"""File with the columns of each client's examples, named ``CLIENT.COLUMN``."""


@dataclass(frozen=True)
class Setting:
    """A workload from ``workload.write``; its examples are tokenized."""

    model: str
    """Folder of the pretrained model."""
    task_type: str
    """PEFT's name: SEQ_CLS or CAUSAL_LM."""
    lora: Mapping[str, Any]
    optimizer: str
    """adamw or sgd, without weight decay; gradients are clipped to norm 1."""
    learning_rate: float
    batch_size: int
    clients: Sequence[Mapping[str, Tensor]]
    """The columns of each client's examples, of equal length."""
    start: State
    """Adapter before the first round, by PEFT's names."""


def load(folder: str | Path) -> Setting:
    """Load a workload."""
    folder = Path(folder)
    values = json.loads((folder / "setting.json").read_text())
    clients: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / EXAMPLES).items():
        client, _, column = name.partition(".")
        clients.setdefault(int(client), {})[column] = tensor
    columns = [clients[client] for client in range(len(clients))]
    return Setting(**values, clients=columns, start=load_file(folder / START))


def contiguous(state: State) -> dict[str, Tensor]:
    """Return copies with memory of their own, as safetensors needs them."""
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def new_model(setting: Setting) -> Any:
    """Load the pretrained model and add LoRA, as in PEFT's guide."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    causal = setting.task_type == "CAUSAL_LM"
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    config = LoraConfig(task_type=setting.task_type, **setting.lora)
    return get_peft_model(auto.from_pretrained(setting.model), config)


@cache
def kept(folder: str) -> tuple[Any, Setting]:
    """Load model and workload once per process."""
    setting = load(folder)
    return new_model(setting), setting


def rows(columns: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the examples of a client one by one."""
    count = len(next(iter(columns.values())))
    return [{name: column[row] for name, column in columns.items()} for row in range(count)]


def new_optimizer(parameters: Any, setting: Setting) -> torch.optim.Optimizer:
    """Return an optimizer with a new state."""
    if setting.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=setting.learning_rate)
    return torch.optim.AdamW(parameters, lr=setting.learning_rate, weight_decay=0.0)


def train_in_loop(model: Any, setting: Setting, client: int) -> None:
    """Train for one epoch in a loop of PyTorch."""
    from torch.utils.data import DataLoader

    examples: Any = rows(setting.clients[client])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = new_optimizer(trained, setting)
    model.train()
    for batch in DataLoader(examples, setting.batch_size, shuffle=True):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_with_trainer(model: Any, setting: Setting, client: int) -> None:
    """Train for one epoch with a new Trainer of transformers, which SFTTrainer of TRL extends."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir="output",
        num_train_epochs=1,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        optim="sgd" if setting.optimizer == "sgd" else "adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    examples: Any = rows(setting.clients[client])
    Trainer(model, arguments, default_data_collator, examples).train()


def size(setting: Setting, client: int) -> int:
    """Return the number of a client's examples."""
    return len(next(iter(setting.clients[client].values())))


def adapter(model: Any) -> dict[str, Tensor]:
    """Return a copy of a model's adapter."""
    from peft import get_peft_model_state_dict

    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def set_adapter(model: Any, state: State) -> None:
    """Replace a model's adapter."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, dict(state))


def save_end(folder: str | Path, program: str, state: State) -> None:
    """Write the adapter after the last round, for tests."""
    save_file(contiguous(state), Path(folder) / f"end-{program}.safetensors")

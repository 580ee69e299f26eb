"""The setting of the rows (MiniLM, 32 tokens, equal clients), and a plain PEFT program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fedmerge_peft import Federation, Recipe
from fedmerge_peft.data import Client, FederatedData
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.models.pretrained import model_folder

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
RATE = 1e-3
_WORDS = [
    "order",
    "parcel",
    "refund",
    "charge",
    "account",
    "password",
    "screen",
    "update",
    "invoice",
    "tracking",
    "delivery",
    "error",
    "button",
    "page",
    "month",
    "plan",
]


def engine(
    clients: int, examples: int, *overrides: str, model: str = MODEL, tests: int = 0
) -> LocalEngine:
    """Return an engine; each client has ``examples`` training and ``tests`` test examples."""
    recipe = Recipe.load(
        "smoke",
        [
            f"backbone.model={model}",
            "task.label=label",
            "task.max_length=32",
            "training.device=cpu",
            f"training.learning_rate={RATE}",
            "lora.r=8",
            "strategy=fedavg",
            "baselines=[]",
            "rounds=100000",
            "evaluation.every=100000",
            "evaluation.finetuned=false",
            *overrides,
        ],
    )
    return LocalEngine.from_data(recipe, made_data(clients, examples, tests))


def made_data(clients: int, examples: int, tests: int) -> FederatedData:
    """Return clients with ``examples`` training and ``tests`` test examples of 40 words each."""
    generator = np.random.default_rng(0)
    each = examples + tests
    texts = [" ".join(generator.choice(_WORDS, 40)) for _ in range(clients * each)]
    rows = np.arange(clients * each).reshape(clients, each)
    none = rows[0, :0]
    held = [
        Client(f"client {number}", own[:examples], none, own[examples:])
        for number, own in enumerate(rows)
    ]
    table = Dataset.from_dict({"text": texts, "label": [0, 1] * (len(texts) // 2)})
    return FederatedData(table, held)


def rounds(engine: LocalEngine, measured: bool = False) -> Federation:
    """Return a federation past its first round, so that ``evaluation.every`` alone applies.

    The engine's caches are empty: every job is trained.
    """
    engine.clear_caches()
    recipe = engine.recipe.model_copy(
        update={"evaluation": engine.recipe.evaluation.model_copy(update={"every": 1})}
    )
    federation = Federation(recipe if measured else engine.recipe, engine)
    federation.completed = 1
    return federation


class Plain:
    """PEFT, Accelerate and a DataLoader, used as in their guides, on the examples of an engine."""

    def __init__(self, engine: LocalEngine) -> None:
        from accelerate import Accelerator
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.batch_size = engine.recipe.training.batch_size
        self.columns = engine.runtime.examples.columns
        self.accelerator = Accelerator(cpu=True)
        with TemporaryDirectory() as folder:
            loaded = AutoModelForSequenceClassification.from_pretrained(
                model_folder(engine.recipe.backbone, Path(folder))
            )
        wanted = engine.recipe.lora
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=wanted.r,
            lora_alpha=wanted.alpha,
            target_modules=list(wanted.target_modules or []),
        )
        self.model = self.accelerator.prepare_model(get_peft_model(loaded, config))
        self.model.train()
        self.parameters = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]

    def loader(
        self, rows: Sequence[int], batch_size: int | None = None
    ) -> DataLoader[dict[str, Tensor]]:
        examples = [{name: column[row] for name, column in self.columns.items()} for row in rows]
        return DataLoader(
            examples,
            batch_size or self.batch_size,
            shuffle=batch_size is None,
            collate_fn=default_collate,
        )

    def prepared(self, rows: Sequence[int]) -> Callable[[], float]:
        """Set up a centralized loop on these rows; each call of the result is an epoch."""
        optimizer, loader = self.accelerator.prepare(self.optimizer(), self.loader(rows))
        return lambda: self._epoch(loader, optimizer)

    def train(self, rows: Sequence[int]) -> float:
        """Train one client for an epoch, with its own DataLoader and optimizer."""
        return self._epoch(self.loader(rows), self.optimizer())

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)

    def _epoch(
        self, loader: Iterable[dict[str, Tensor]], optimizer: torch.optim.Optimizer
    ) -> float:
        losses = []
        for batch in loader:
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[int]) -> float:
        """Return the accuracy on these rows."""
        self.model.eval()
        right = 0
        for batch in self.loader(rows, 64):
            labels = batch.pop("labels")
            right += int((self.model(**batch).logits.argmax(dim=1) == labels).sum())
        self.model.train()
        return right / len(rows)

    def state(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        return {
            name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.model).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.model, dict(state))


def averaged(states: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Average by FedAvg, tensor by tensor."""
    total = sum(sizes)
    return {
        name: sum(state[name] * (size / total) for state, size in zip(states, sizes, strict=True))
        for name in states[0]
    }

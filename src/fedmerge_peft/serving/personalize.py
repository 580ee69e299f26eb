"""An adapter for a client that was never in the federation, from its finished soup.

The soup Θ stays as it is; only the newcomer's d logits w are learned, on its own few examples: min_w ℓ(softmax(w) Θ). With
θ = Σ_j π_j Θ_j the chain rule gives ∂ℓ/∂w_j = π_j ⟨Θ_j − θ, ∂ℓ/∂θ⟩, the same gradient that FedMerge's server follows
(arXiv 2504.06768), here exact instead of from a round's update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.data import Client, FederatedData, Indices, load_splits
from fedmerge_peft.data.partition import split_off
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import DataError, RunError
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.merged_adapter import fit
from fedmerge_peft.strategies.server_step import weights_gradient
from fedmerge_peft.tasks.classification import relabel
from fedmerge_peft.training.accelerator import choose_device, choose_precision
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.optimization import count_steps
from fedmerge_peft.training.plan import Train
from fedmerge_peft.util.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset


MERGING = ("fedmerge", "ifca", "fesem", "flhc")
"""Strategies whose soup is common property: their adapters may be merged for a newcomer."""

_PATIENCE = 5
"""Steps without gain after which learning ends."""
_GAIN = 1e-3
"""The least fall of the loss (nats) that counts as gain."""
_SPREAD = 0.1
"""Part of the start's weight that is spread over all adapters."""
_ALIKE = 0.1
"""Below this total variation distance, two rows of π are the same choice."""
_LOCAL_STEPS = 500
"""Most optimizer steps of local training, where the recipe's rounds ask for more."""
_TINY = 1e-6

Objective = Callable[[Tensor], tuple[float, Tensor]]
"""From an adapter ``(P,)`` to the mean training loss (nats) and its gradient ``(P,)``."""


@dataclass(frozen=True)
class Method:
    """One way to an adapter for the newcomer, and how good that is."""

    name: str
    detail: str
    """Which adapter, which client; empty where there is nothing to say."""
    train_loss: float
    """Mean loss (nats) on the examples that were learned from."""
    test: Mapping[str, float]
    """Loss (nats) and metrics on the test examples, by name; empty where there are none."""
    seconds: float
    """Wall time to find the adapter, without testing it."""


@dataclass(frozen=True)
class Personalized:
    """A newcomer's adapter, and what the other choices would have given."""

    name: str
    soup: AdapterSoup
    logits: Tensor
    """w, ``(d,)`` float32."""
    methods: tuple[Method, ...]
    """What a user would weigh, on the same examples; ``learned weights`` is the one that this adapter comes from."""
    nearest: str
    """The federation's client whose weights are most like these, by ½ ‖π − π'‖₁."""
    examples: Mapping[str, int]
    """Number of examples learned from (``train``) and tested on (``test``)."""
    config: Mapping[str, Any]
    """PEFT's configuration of the adapter."""

    @property
    def weights(self) -> Tensor:
        """π = softmax(w), ``(d,)``."""
        return torch.softmax(self.logits, dim=0)

    @property
    def row(self) -> Tensor:
        """θ = π Θ, ``(P,)``."""
        return self.soup.merge(self.weights)

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter in PEFT's saved form."""
        return self.soup.state_dict(self.row)

    def save(self, folder: Path | str) -> Path:
        """Write a new folder that ``PeftModel.from_pretrained`` loads, with ``weights.json``: logits, π and the methods' numbers.

        Raises ``RunExistsError`` where the folder has anything in it, ``RunError`` where it cannot be written.
        """
        folder = Path(folder)
        RunDirectory.check_free(folder)
        document = {
            "name": self.name,
            "examples": dict(self.examples),
            "logits": self.logits.tolist(),
            "weights": self.weights.tolist(),
            "nearest": self.nearest,
            "methods": [asdict(method) for method in self.methods],
        }
        return write_adapter(folder, self.adapter, self.config, weights=document)


def personalize(
    run: RunDirectory | Path | str,
    data: Path | str | Dataset,
    *,
    name: str | None = None,
    best: bool = False,
    test_fraction: float = 0.3,
    max_train: int | None = None,
    local: bool = True,
    seed: int | None = None,
) -> Personalized:
    """Learn a newcomer's merging weights on its own examples, the run's soup as it is, and set the result beside other choices.

    Args:
        run: A run whose adapters are common property (``MERGING``), at least two of them.
        data: The newcomer's examples: a csv, tsv, json, jsonl or parquet file, a folder as in a recipe's ``data.path``, or a
            ``datasets.Dataset``. The columns are those of the run's task; the recipe's filter is not applied.
        name: What to call the newcomer; by default the file's name without its suffix.
        best: Take the soup of the best round instead of the last.
        test_fraction: Part of the examples set aside for testing, 0 for none; not used where the data have the recipe's split column:
            there its test split is for testing, and the training and validation splits are learned from.
        max_train: Most examples to learn from, drawn at random; by default all.
        local: Train an adapter from scratch as well, for comparison: as long as a client of the federation did.
        seed: Decides which examples are set aside, and local training; by default the recipe's.

    Raises:
        RunError: The run has nothing that could be merged for a newcomer, or its adapters do not fit the model as it loads today.
        DataError: The data cannot be read, are not what the task says, or hold a label that the run does not know.
        FedMergeError: Model or device are absent.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory.open(run)
    soup, known = run.state(best=best)
    _check_merges(run, soup)
    seed = run.recipe.seed if seed is None else seed
    table, newcomer = _read(run, data, name, test_fraction, max_train, seed)
    engine = LocalEngine.from_data(_recipe(run), FederatedData(table, [newcomer]))
    fit(engine.backbone, soup, run)
    clients = run.clients.index.tolist()
    compared = _Comparison(engine, soup)
    logits = compared.learn(known, clients)
    if local:
        compared.train_alone(seed)
    nearest = clients[int((known - torch.softmax(logits, dim=0)).abs().sum(dim=1).argmin())]
    sizes = {"train": newcomer.size, "test": len(newcomer.test)}
    return Personalized(
        newcomer.name, soup, logits, tuple(compared.methods), nearest, sizes, run.adapter_config
    )


def learn_logits(
    rows: Tensor, start: Tensor, objective: Objective, *, steps: int = 25, lr: float = 0.5
) -> tuple[Tensor, float]:
    """min_w ℓ(softmax(w) Θ) from the weights given, on all examples at once, by Rprop (Riedmiller & Braun 1993).

    With no noise in the gradient, its signs and a step size for each logit need fewer evaluations than Adam, at any scale of the loss.

    Args:
        rows: Θ, ``(d, P)``.
        start: π to start from, ``(d,)``; a little of every other adapter is mixed in, as a softmax has no way back from 0.
        objective: ℓ and its gradient at an adapter.
        steps: Most evaluations of the objective, at least 1; fewer where some of them bring no gain.
        lr: First step, in logits.

    Returns:
        The logits ``(d,)`` float64 with the lowest loss seen, the start's included, and that loss.
    """
    logits = ((1 - _SPREAD) * start.double() + _SPREAD / len(start)).log().requires_grad_()
    optimizer = torch.optim.Rprop([logits], lr=lr, step_sizes=(1e-3, 2.0))
    best, lowest = logits.detach().clone(), math.inf
    reference, idle = math.inf, 0
    for _ in range(steps):
        weights = torch.softmax(logits.detach(), dim=0)
        loss, gradient = objective(weights.to(rows) @ rows)
        if loss < lowest:
            best, lowest = logits.detach().clone(), loss
        reference, idle = (loss, 0) if loss < reference - _GAIN else (reference, idle + 1)
        if idle == _PATIENCE:
            break
        logits.grad = weights_gradient(rows, weights[None], gradient[None])[0].to(logits)
        optimizer.step()
    return best, lowest


def distinct(known: Tensor, covered: Tensor, most: int = 16) -> list[int]:
    """Numbers of the rows of π ``(m, d)`` that are unlike those ``covered`` ``(k, d)`` and each other, the farthest first.

    Unlike is a total variation distance ½ ‖π − π'‖₁ of at least 0.1.
    """
    chosen: list[int] = []
    distance = torch.cdist(known, covered, p=1).amin(dim=1) / 2
    while len(chosen) < most and float(distance.max()) >= _ALIKE:
        chosen.append(int(distance.argmax()))
        distance = distance.minimum((known - known[chosen[-1]]).abs().sum(dim=1) / 2)
    return chosen


class _Comparison:
    """The newcomer's examples, the soup, and the methods tried so far."""

    def __init__(self, engine: LocalEngine, soup: AdapterSoup) -> None:
        self.engine = engine
        self.newcomer = engine.clients[0]
        self.rows = soup.rows
        self.methods: list[Method] = []
        batches = (engine.runtime.collate(chunk)["labels"] for chunk in self._chunks())
        self._count = sum(engine.task.count_terms(labels) for labels in batches)

    def learn(self, known: Tensor, clients: list[str]) -> Tensor:
        """Try what needs no learning, then learn the logits from the best of it; returns them, ``(d,)``."""
        adapters = len(self.rows)
        singles, uniform = torch.eye(adapters), torch.full((1, adapters), 1 / adapters)
        chosen = distinct(known, torch.cat([singles, uniform]))
        tried = [
            self._try("mean adapter", uniform, [""]),
            self._try(
                "best single adapter", singles, [f"adapter {number}" for number in range(adapters)]
            ),
        ]
        if chosen:
            tried.append(
                self._try(
                    "a client's weights", known[chosen], [clients[number] for number in chosen]
                )
            )
        start, lowest = min(tried, key=lambda each: each[1])
        begin = time.perf_counter() - sum(method.seconds for method in self.methods)
        logits, loss = learn_logits(self.rows, start, self._objective)
        if lowest < loss:  # the start is all but one-hot, and a softmax never gets there
            logits, loss = start.double().clamp_min(_TINY).log(), lowest
        logits = (logits - logits.mean()).float()
        self._add(
            "learned weights",
            "",
            loss,
            torch.softmax(logits, dim=0).to(self.rows) @ self.rows,
            begin,
        )
        return logits

    def train_alone(self, seed: int) -> None:
        """Train a fresh adapter as a client does that shares nothing, over the recipe's rounds."""
        begin = time.perf_counter()
        engine, training = self.engine, self.engine.recipe.training
        rounds = min(
            engine.recipe.rounds, max(1, _LOCAL_STEPS // count_steps(self.newcomer.size, training))
        )
        row = engine.strategy_context().fresh_row(0)
        for number in range(1, rounds + 1):
            purpose = derive(seed, "train", number, self.newcomer.name)
            job = Job(Train(row), self.newcomer.train, purpose)
            row = train(engine.runtime, training, [job])[0].row
        self._add(
            "local training", f"{rounds} round{'s' * (rounds > 1)}", self._loss(row), row, begin
        )

    def _try(self, name: str, weights: Tensor, details: list[str]) -> tuple[Tensor, float]:
        """Remember the best of several weights ``(k, d)`` as one method; returns it and its loss."""
        begin = time.perf_counter()
        losses = [self._loss(each.to(self.rows) @ self.rows) for each in weights]
        best = int(np.argmin(losses))
        self._add(name, details[best], losses[best], weights[best].to(self.rows) @ self.rows, begin)
        return weights[best], losses[best]

    def _add(self, name: str, detail: str, loss: float, row: Tensor, begin: float) -> None:
        seconds = time.perf_counter() - begin
        test, size = self.newcomer.test, self.engine.recipe.evaluation.batch_size
        scores = evaluate(self.engine.runtime, row, test, size) if len(test) else {}
        self.methods.append(Method(name, detail, loss, scores, seconds))

    def _loss(self, row: Tensor) -> float:
        size = (
            self.engine.recipe.training.batch_size
        )  # the batches of _objective, so that the losses compare exactly
        losses = example_losses(self.engine.runtime, row, self.newcomer.train, size)
        return float(losses.double().sum()) / self._count

    def _objective(self, row: Tensor) -> tuple[float, Tensor]:
        slot = AdapterSlot(self.engine.backbone, row)
        self.engine.backbone.eval()
        loss = accumulate(self.engine.runtime, slot, [self._chunks()])
        return float(loss), slot.gradient[0].cpu()

    def _chunks(self) -> list[Indices]:
        """The examples to learn from, as many at a time as local training takes."""
        rows, size = self.newcomer.train, self.engine.recipe.training.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def _check_merges(run: RunDirectory, soup: AdapterSoup) -> None:
    strategy, takes = run.recipe.strategy.name, " or ".join(MERGING)
    if len(soup) == 1:
        raise RunError(
            f"{run.path} has one adapter for all clients ({strategy}), so there are no weights to learn: run.save_adapter writes it "
            f"as it is. To have a choice for new clients, run {takes} with strategy.adapters=5, say"
        )
    if strategy not in MERGING:
        raise RunError(
            f"{run.path} is a run of {strategy}, whose adapters are not for another client to merge; take a run of {takes}"
        )


def _read(
    run: RunDirectory,
    data: Path | str | Dataset,
    name: str | None,
    test_fraction: float,
    max_train: int | None,
    seed: int,
) -> tuple[Dataset, Client]:
    """The newcomer's table, labels numbered as the run's are, and the newcomer itself."""
    from datasets import Dataset, concatenate_datasets

    if not 0 <= test_fraction < 1:
        raise DataError(
            f"test_fraction: {test_fraction:g} leaves nothing to learn from; give a number from 0 to below 1"
        )
    if isinstance(data, Dataset):
        splits, name = {"train": data}, name or "newcomer"
    else:
        splits, name = _splits(run.recipe, Path(data).expanduser()), name or Path(data).stem
    table = concatenate_datasets(list(splits.values()))
    if run.recipe.task.name != "causal-lm":
        table = relabel(table, run.recipe.task.label, run.task["labels"])
    held = _held(run.recipe, splits, table)
    rng = np.random.default_rng(derive(seed, "newcomer", name))
    train, _, test = split_off(
        held["train"], 0, 0 if "test" in held else test_fraction, max_train, rng
    )
    if not len(train):
        raise DataError(f"{name}: there are no examples to learn from")
    return table, Client(name, train, np.empty(0, np.int64), held.get("test", test))


def _splits(recipe: Recipe, path: Path) -> dict[str, Dataset]:
    """What the file or folder holds, unfiltered, by the splits' usual names."""
    if not path.exists():
        raise DataError(
            f"{path.absolute()} does not exist; give the new client's examples as a csv, json, jsonl or parquet file"
        )
    usual = {
        "train_split": "train",
        "validation_split": None,
        "test_split": None,
        "split_column": None,
    }
    return load_splits(
        recipe.data.model_copy(
            update={**usual, "path": str(path), "config": None, "revision": None, "filter": {}}
        )
    )


def _held(recipe: Recipe, splits: Mapping[str, Dataset], table: Dataset) -> dict[str, Indices]:
    """Row numbers to learn from (``train``) and, where the data name a split for it, to test on."""
    column = recipe.data.split_column
    if len(splits) > 1:
        names = np.concatenate([np.full(len(part), split) for split, part in splits.items()])
        wanted = {"train": ("train", "validation"), "test": ("test",)}
    elif column is not None and column in table.column_names:
        names = np.array([str(value) for value in table[column]])
        data = recipe.data
        wanted = {
            "train": (data.train_split, data.validation_split or "validation"),
            "test": (data.test_split or "test",),
        }
    else:
        return {"train": np.arange(len(table))}
    return {part: np.flatnonzero(np.isin(names, these)) for part, these in wanted.items()}


def _recipe(run: RunDirectory) -> Recipe:
    """The run's recipe, with what its data told about the task; without fp16, whose gradients would need a scaler."""
    recipe, training = run.recipe, run.recipe.training
    if choose_precision(training.mixed_precision, choose_device(training.device)) == "fp16":
        training = training.model_copy(update={"mixed_precision": "no"})
    task = recipe.task
    if task.name == "causal-lm":
        task = task.model_copy(update={"format": run.task["format"]})
    return recipe.model_copy(update={"task": task, "training": training})

"""Clients with real texts and a small model with LoRA, to measure attacks in seconds.

The model averages the pretrained word embeddings of MiniLM, as in deep averaging networks (Iyyer et
al. 2015), and classifies the average e of a text:

    logits = V relu((W + B A) e + b).

W ``(H, D)`` is frozen. A ``(r, D)``, B ``(H, r)`` and the head V ``(C, H)`` are trained. Training,
strategies and rules are the package's, as in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from collusion import Send
from torch import Tensor, nn

from fedmerge_peft import Recipe
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.federation.loop import Federation
from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.tasks.in_memory import PassedModel, take_model
from fedmerge_peft.util.seeds import derive

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
HIDDEN = 128
TARGET = 0
"""Label that the trigger of a backdoor asks for."""
TRIGGER = "cf"
"""Rare word that a backdoor puts in front of texts (Kurita et al. 2020, arXiv 2004.06660)."""


class AveragedWords(nn.Module):
    """Mean of word embeddings, a hidden layer and a head."""

    def __init__(self, embeddings: Tensor, labels: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding.from_pretrained(embeddings)
            self.hidden = nn.Linear(embeddings.shape[1], HIDDEN)
            self.classifier = nn.Linear(HIDDEN, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(batch, labels)``."""
        mask = attention_mask[..., None]
        mean = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(torch.relu(self.hidden(mean)))
        return logits


def averaged_words(labels: int) -> PassedModel:
    """Return the model with MiniLM's embeddings and tokenizer, for recipes to name."""
    from transformers import AutoModel, AutoTokenizer

    from fedmerge_peft.models.pretrained import model_folder

    folder = model_folder(Recipe.load("quickstart").backbone, None)
    embeddings = AutoModel.from_pretrained(folder).get_input_embeddings().weight.detach().clone()
    passed = take_model(
        AveragedWords(embeddings, labels), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    assert passed is not None
    return passed


@dataclass
class Attack:
    """Behavior of colluders.

    ``poison`` changes their examples and ``send`` their updates.
    """

    hostile: Sequence[int]
    send: Send
    poison: Callable[[LocalEngine, Sequence[int]], LocalEngine] = field(
        default=lambda engine, _: copy(engine)
    )


def attacked(engine: LocalEngine, attack: Attack, seed: int) -> LocalEngine:
    """Return an engine whose colluders agree on their updates; it shares model and data."""
    changed = attack.poison(engine, attack.hostile)
    changed.clear_caches()  # what is cached depends on the examples

    def train_clients(number: int, assignments: Iterable[Any]) -> Iterator[Any]:
        pairs = list(LocalEngine.train_clients(changed, number, assignments))
        own = [place for place, (_, reply) in enumerate(pairs) if reply.client in attack.hostile]
        draws = torch.Generator().manual_seed(derive(seed, "attack", number))
        sent = attack.send(number, torch.cat([pairs[place][1].deltas for place in own]), draws)
        for place, delta in zip(own, sent, strict=True):
            plan, reply = pairs[place]
            pairs[place] = plan, replace(reply, deltas=delta[None].clone())
        yield from pairs

    changed.train_clients = train_clients  # type: ignore[method-assign]
    return changed


def with_trigger(engine: LocalEngine, hostile: Sequence[int]) -> LocalEngine:
    """Return an engine with the trigger and the target in half of the colluders' examples."""
    rows = [engine.clients[client].train for client in hostile]
    return _triggered(engine, [row for own in rows for row in own[: len(own) // 2].tolist()])


def of_the_victims(group: str) -> Callable[[LocalEngine, Sequence[int]], LocalEngine]:
    """Return a function that gives the colluders the examples of clients of a group."""

    def poison(engine: LocalEngine, hostile: Sequence[int]) -> LocalEngine:
        changed = copy(engine)
        victims = [client for client in engine.clients if client.group == group]
        clients = list(engine.clients)
        for place, client in enumerate(hostile):
            rows = victims[place % len(victims)].train
            clients[client] = replace(clients[client], train=rows)
        changed.clients = clients
        return changed

    return poison


def accuracies(engine: LocalEngine, federation: Federation) -> np.ndarray:
    """Return each client's accuracy on its test examples, ``(m,)``, with its served adapter."""
    served = [(i, federation.strategy.served(i)) for i in range(len(engine.clients))]
    scores = dict(engine.evaluate_clients(served))
    return np.array([scores[i]["test_accuracy"] for i in range(len(served))])


def trigger_rate(engine: LocalEngine, federation: Federation, honest: Sequence[int]) -> float:
    """Return the share of the honest clients' test texts that get the target with the trigger.

    Texts whose label is the target do not count.
    """
    labels = engine.runtime.examples.columns["labels"]
    others = {
        i: np.array([row for row in engine.clients[i].test if int(labels[row]) != TARGET])
        for i in honest
    }
    changed = _triggered(engine, [row for rows in others.values() for row in rows.tolist()])
    changed.clients = [
        replace(client, test=others.get(i, client.test)) for i, client in enumerate(engine.clients)
    ]
    scores = accuracies(changed, federation)
    return fmean(float(scores[i]) for i in honest if len(others[i]))


def _triggered(engine: LocalEngine, rows: Sequence[int]) -> LocalEngine:
    """Return an engine with the trigger behind the first token of these rows, and the target."""
    (trigger,) = engine.task.processor(TRIGGER, add_special_tokens=False)["input_ids"][:1]
    columns = {name: list(column) for name, column in engine.runtime.examples.columns.items()}
    for row in rows:
        ids = columns["input_ids"][row]
        columns["input_ids"][row] = torch.cat([ids[:1], ids.new_tensor([trigger]), ids[1:]])
        columns["labels"][row] = torch.tensor(TARGET)
    changed = copy(engine)
    changed.runtime = replace(engine.runtime, examples=Examples(columns))
    changed.clear_caches()
    return changed

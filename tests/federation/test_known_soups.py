"""Soups of sixteen methods equal those of version 0.1.

``known_soups.json`` was computed with the code of version 0.1: for each method, the norms of the
soup's rows, their products with sin(0), sin(1), ..., the weights, and the training losses of two
rounds. A change of the arithmetic shows as a difference. Training is by SGD, which keeps the
rounding errors of another processor small.
"""

import json
from pathlib import Path

import pytest
import torch

from equality import assert_near
from fedmerge_peft import Federation, Recipe
from fedmerge_peft.engines.local import LocalEngine

pytestmark = pytest.mark.equality

KNOWN = json.loads(Path(__file__).with_name("known_soups.json").read_text())
OPTIONS = {
    "fedmerge": "adapters: 3, start: independent, weights_lr: 1.0",
    "ifca": "adapters: 3",
    "fesem": "adapters: 2",
    "flhc": "adapters: 2",
    "fedem": "adapters: 2",
}
SMALL = [
    "data.path=embedded:support-tickets",  # version 0.1 had no other data
    "task.max_length=32",
    "data.max_train=8",
    "data.max_test=4",
    "data.filter.provider=[Alder]",
    "training.device=cpu",
    "baselines=[]",
    "rounds=2",
    "training.optimizer=sgd",
    "training.learning_rate=0.1",
    "training.momentum=0.9",
    "lora.dropout=0.1",
]


@pytest.fixture(scope="module")
def engine():
    """The engine of all sixteen recipes, which differ in their strategies only."""
    return LocalEngine.from_recipe(Recipe.load("smoke", SMALL))


def measure(rows):
    """Norms of the rows and their products with the probe, in float64, ``(2, d)``."""
    rows = rows.double()
    probe = torch.sin(torch.arange(rows.shape[1], dtype=torch.float64))
    return torch.stack([rows.norm(dim=1), rows @ probe])


def version_0_1(strategy):
    """Rows and weights in the form of version 0.1, which had a row for each private part."""
    soup, weights = strategy.soup, strategy.weights
    if soup.own is None:
        return soup.rows, weights
    clients = torch.eye(len(weights))
    return soup.merge(weights, clients), clients


@pytest.mark.parametrize("method", KNOWN)
def test_a_soup_equals_that_of_version_0_1(engine, method):
    """Norms and probes are compared by how far the two rounds moved them."""
    strategy = f"strategy={{name: {method}, {OPTIONS.get(method, '')}}}"
    federation = Federation(Recipe.load("smoke", [strategy, *SMALL]), engine)
    start = measure(version_0_1(federation.strategy)[0])
    losses = [record.train_loss for record in federation.rounds()]
    known = {
        name: torch.tensor(values, dtype=torch.float64) for name, values in KNOWN[method].items()
    }
    rows, weights = version_0_1(federation.strategy)
    moved = measure(rows) - start
    expected = torch.stack([known["norms"], known["probes"]]) - start
    assert_near(moved.float(), expected.float())
    assert_near(weights, known["weights"].float())
    assert_near(torch.tensor(losses), known["train_loss"].float())

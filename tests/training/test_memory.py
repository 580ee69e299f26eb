"""The number of clients in a pass, by the free memory of a GPU."""

import copy
import logging

import pytest

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.training import memory
from fedmerge_peft.training.estimate import estimate
from fedmerge_peft.training.memory import clients_that_fit


@pytest.fixture
def needs(smoke, smoke_engine):
    """``needs(4)``: estimated bytes of a training pass of four clients of the smoke recipe."""

    def bytes_of(clients):
        config = copy.deepcopy(smoke_engine.backbone.model.config)
        length = int(smoke_engine.runtime.examples.lengths.max())
        found = estimate(smoke(), config, length=length, clients=clients)
        return found.adapters + found.training

    return bytes_of


def test_the_number_is_halved_until_the_pass_fits(smoke, smoke_engine, monkeypatch, caplog, needs):
    assert needs(8) > 1.5 * needs(4) > 2 * needs(2)
    for free, expected in {needs(8): 8, needs(8) - 1: 4, needs(4) - 1: 2, 0: 1}.items():
        monkeypatch.setattr(
            memory, "free_memory", lambda _, free=free: (free + 0.5) / memory._USABLE
        )
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert clients_that_fit(smoke_engine.runtime, smoke(), 8) == expected
        assert ("instead of 8, because" in caplog.text) == (expected < 8)


def test_the_engine_trains_as_many_as_fit(smoke, monkeypatch, needs):
    engine = LocalEngine.from_recipe(smoke())
    monkeypatch.setattr("fedmerge_peft.engines.local.clients_per_batch", lambda *_: 6)
    monkeypatch.setattr(memory, "free_memory", lambda _: needs(4) / memory._USABLE)
    assert engine.clients_per_batch == 3


def test_a_number_in_the_recipe_and_other_devices_are_not_changed(smoke, smoke_engine, monkeypatch):
    assert clients_that_fit(smoke_engine.runtime, smoke(), 8) == 8  # on a CPU
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    chosen = smoke("training.clients_per_batch=8")
    assert clients_that_fit(smoke_engine.runtime, chosen, 8) == 8

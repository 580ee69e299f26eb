"""The number of CPU threads follows from the size of the work."""

import pytest
import torch


@pytest.fixture
def two_threads(monkeypatch):
    """Let torch use two threads, without ``OMP_NUM_THREADS``."""
    usual = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


def threads(runtime, examples):
    with runtime.cpu_threads(examples):
        return torch.get_num_threads()


def test_small_passes_use_one_thread_and_large_ones_all(smoke_engine, two_threads):
    runtime = smoke_engine.runtime
    assert threads(runtime, 4) == 1
    assert torch.get_num_threads() == 2
    assert threads(runtime, 10**9) == 2


def test_the_variable_of_the_user_wins(smoke_engine, two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(smoke_engine.runtime, 4) == 2

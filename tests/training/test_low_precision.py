"""Several adapters in one pass in fp16, on quantized weights and with 8-bit optimizer states."""

import logging
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft.training import loop
from fedmerge_peft.training.loop import train
from training.stack_bench import SGD, Bench


@pytest.fixture
def make_bench(tiny_models, table_and_task):
    """``make_bench("gpt2", lora={...})``."""
    return partial(Bench, tiny_models, table_and_task)


@pytest.fixture
def fp16(make_bench):
    """A bench whose accelerator has a gradient scaler, as in fp16, which needs a CUDA GPU."""
    bench = make_bench(epochs=3, **SGD)
    bench.accelerator.scaler = torch.amp.GradScaler("cpu")
    yield bench
    bench.accelerator.scaler = None


@pytest.mark.equality
def test_each_adapter_has_its_own_loss_scale(fp16):
    """An overflow skips a step of one client alone; the others train as without it."""
    assert fp16.count(clients_per_batch=4) == 4
    jobs = fp16.jobs()
    unscaled = fp16.plainly(jobs)
    overflows = replace(jobs[2].train, example_weights=torch.tensor([0.3, math.inf, 2.0]))
    jobs[2] = replace(jobs[2], train=overflows)
    alone, together = fp16.alone(jobs), fp16.together(jobs)
    for job, plain, one, shared in zip(jobs, unscaled, alone, together, strict=True):
        assert_near(shared.row, one.row, job.train.row)
        if job is not jobs[2]:
            assert_near(one.row, plain.row, job.train.row)
    assert 0 < (together[2].row - jobs[2].train.row).norm() < math.inf
    assert math.isinf(together[2].loss)


def test_the_scaler_of_one_adapter_is_not_that_of_the_next(fp16):
    scaler = fp16.accelerator.scaler
    fp16.alone(fp16.jobs())
    assert fp16.accelerator.scaler is scaler
    assert scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_8bit"])
def test_steps_that_are_all_skipped_change_nothing_and_are_reported(
    make_bench, monkeypatch, caplog, optimizer
):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    bench = make_bench(epochs=3, weight_decay=0.1, optimizer=optimizer)
    monkeypatch.setattr(bench.accelerator, "scaler", torch.amp.GradScaler("cpu"))
    jobs = bench.jobs()
    bench.together(jobs)
    assert not caplog.messages
    monkeypatch.setattr(
        loop, "new_scaler", lambda _: torch.amp.GradScaler("cpu", init_scale=math.inf)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = bench.together(jobs)
    for job, trained in zip(jobs, results, strict=True):
        assert torch.equal(trained.row, job.train.row)
        assert math.isfinite(trained.loss)
    (message,) = caplog.messages
    assert message.startswith("4 of 4 adapters did not change, because the gradients overflowed")


def test_skipped_steps_are_counted_until_the_loss_scale_is_zero():
    weight = torch.zeros(2, requires_grad=True)
    optimizer, steps = torch.optim.SGD([weight], lr=1.0), 200
    scaler = torch.amp.GradScaler("cpu")
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    group = loop._OptimizerGroup(slice(0, 1), steps, optimizer, schedule, scaler, 2.0**16)
    scaler.scale(torch.zeros(1))  # creates the scale
    for _ in range(steps):
        weight.grad = torch.tensor([math.inf, 1.0])
        group.step()
    assert scaler.get_scale() == 0.0
    assert not group.has_stepped()


def test_adapters_in_one_pass_have_8_bit_states_of_their_own(make_bench):
    """With a common state, adapters would share scales, as blocks of numbers span adapters."""
    pytest.importorskip("bitsandbytes")
    lora = {"r": 32, "target_modules": ["query", "key", "value"]}  # over 4096 numbers: 8 bits
    bench = make_bench(lora=lora, optimizer="adamw_8bit", epochs=3)
    assert bench.backbone.layout.size > 4096
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    exact = train(
        bench.runtime, bench.recipe.training.model_copy(update={"optimizer": "adamw"}), jobs
    )
    for job, alone, together, other in zip(
        jobs, bench.alone(jobs), bench.together(jobs), exact, strict=True
    ):
        moved = (alone.row - job.train.row).norm()
        assert (together.row - alone.row).norm() <= 0.01 * moved
        assert (other.row - alone.row).norm() > 0  # 8 bits were used


@pytest.mark.equality
@pytest.mark.parametrize("double", [False, True])
def test_adapters_on_4_bit_weights_share_a_pass(make_bench, double):
    pytest.importorskip("bitsandbytes")
    options = {"quantization": "4bit", "double_quantization": double}
    bench = make_bench("llama", backbone=options, **SGD)
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    plainly = bench.plainly(jobs)
    unquantized = make_bench("llama", **SGD).alone(jobs)
    for job, plain, alone, together, other in zip(
        jobs, plainly, bench.alone(jobs), bench.together(jobs), unquantized, strict=True
    ):
        moved = (plain.row - job.train.row).norm()
        for ours in (alone, together):
            assert (ours.row - plain.row).norm() <= tolerance(torch.bfloat16) * moved
        assert (other.row - plain.row).norm() > 1e-3 * moved  # the weights differ


def test_adapters_on_8_bit_weights_train_one_at_a_time(make_bench, caplog):
    """All examples of a batch determine the columns that LLM.int8 computes in 16 bits."""
    pytest.importorskip("bitsandbytes")
    bench = make_bench("llama", backbone={"quantization": "8bit"})
    with caplog.at_level(logging.INFO):
        assert bench.count(clients_per_batch=2) == 1
    assert (
        "neither a plain linear layer nor a convolution (Linear8bitLt, Linear8bitLt)" in caplog.text
    )

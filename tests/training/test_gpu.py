"""Training and evaluation on a CUDA GPU, in float32, half precision and 4 bits."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from equality import assert_near, tolerance
from task_bench import run_of
from training.stack_bench import SGD, Bench

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MORE = {"lora": {"r": 32}}
"""Over 4096 numbers, so that optimizers of 8 bits use them."""


@pytest.fixture
def make_stack(tiny_models, table_and_task):
    """``make_stack("gpt2")``: four jobs on a tiny model on the GPU, in float32 by default."""
    return partial(Bench, tiny_models, table_and_task, device=DEVICE)


def distances(jobs, found, expected):
    """‖found − expected‖ of each job, in units of how far its adapter moved."""
    return [
        float((one.row - other.row).norm() / (other.row - job.train.row).norm())
        for one, other, job in zip(found, expected, jobs, strict=True)
    ]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_float32_on_the_gpu_equals_the_cpu_alone_and_together(
    make_stack, tiny_models, table_and_task, kind
):
    bench = make_stack(kind, mixed_precision="no", **SGD)
    assert bench.runtime.device.type == DEVICE
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    on_cpu = Bench(tiny_models, table_and_task, kind, **SGD).alone(jobs)
    for trained in (bench.alone(jobs), bench.together(jobs)):
        for job, found, expected in zip(jobs, trained, on_cpu, strict=True):
            assert found.row.device.type == "cpu"
            assert_near(found.row, expected.row, job.train.row)
            assert found.loss == pytest.approx(expected.loss, rel=tolerance(torch.float32))


def test_a_model_on_all_gpus_trains_as_on_one(make_stack):
    """With one GPU, all layers are on it."""
    bench = make_stack("llama", backbone={"device_map": "balanced"}, mixed_precision="no", **SGD)
    assert all(parameter.is_cuda for parameter in bench.backbone.model.parameters())
    jobs = bench.jobs()
    on_one = make_stack("llama", mixed_precision="no", **SGD).alone(jobs)
    for trained in (bench.alone(jobs), bench.together(jobs)):
        for job, found, expected in zip(jobs, trained, on_one, strict=True):
            assert_near(found.row, expected.row, job.train.row)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_together_equals_bf16_alone(make_stack, kind, dtype):
    bench = make_stack(kind, backbone={"dtype": dtype}, mixed_precision="bf16", **SGD)
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    alone, together = bench.alone(jobs), bench.together(jobs)
    assert max(distances(jobs, together, alone)) <= tolerance(torch.bfloat16)
    exact = make_stack(kind, mixed_precision="no", **SGD).alone(jobs)
    assert min(distances(jobs, alone, exact)) > 1e-6  # half precision was used


def test_in_fp16_each_client_has_its_own_scaler(make_stack):
    """An overflow skips a step of one client alone; the others train as without it."""
    bench = make_stack(mixed_precision="fp16", epochs=3, **SGD)
    assert bench.accelerator.scaler is not None
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    without = bench.together(jobs)
    overflows = replace(jobs[2].train, example_weights=torch.tensor([0.3, math.inf, 2.0]))
    jobs[2] = replace(jobs[2], train=overflows)
    alone, together = bench.alone(jobs), bench.together(jobs)
    assert max(distances(jobs, together, alone)) <= tolerance(torch.float16)
    others = [0, 1, 3]
    apart = distances(jobs, together, without)
    assert max(apart[number] for number in others) <= tolerance(torch.float16)
    assert 0 < (together[2].row - overflows.row).norm() < math.inf
    assert math.isinf(together[2].loss)


@pytest.mark.parametrize("double", [False, True])
def test_clients_on_4_bits_share_a_pass(make_stack, double):
    pytest.importorskip("bitsandbytes")
    options = {
        "quantization": "4bit",
        "double_quantization": double,
        "gradient_checkpointing": True,
    }
    bench = make_stack("llama", backbone=options, mixed_precision="bf16", **SGD)
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    alone, together = bench.alone(jobs), bench.together(jobs)
    assert max(distances(jobs, together, alone)) <= tolerance(torch.bfloat16)
    unquantized = make_stack("llama", mixed_precision="no", **SGD).alone(jobs)
    assert min(distances(jobs, alone, unquantized)) > 1e-3  # the weights differ


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_train_alone_and_together_like_adamw(make_stack, optimizer):
    pytest.importorskip("bitsandbytes")
    bench = make_stack("llama", **MORE, mixed_precision="no", epochs=3, optimizer=optimizer)
    assert bench.backbone.layout.size > 4096
    assert bench.count(clients_per_batch=4) == 4
    jobs = bench.jobs()
    alone, together = bench.alone(jobs), bench.together(jobs)
    adamw = make_stack("llama", **MORE, mixed_precision="no", epochs=3).alone(jobs)
    assert max(distances(jobs, together, alone)) <= 0.02
    assert max(distances(jobs, alone, adamw)) <= 0.2


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_attention_kernels_agree(make_stack, kind):
    eager, sdpa = (
        make_stack(kind, backbone={"attention": name}, mixed_precision="no", **SGD)
        for name in ("eager", "sdpa")
    )
    jobs = eager.jobs()
    assert max(distances(jobs, sdpa.together(jobs), eager.alone(jobs))) <= 1e-3


def test_flash_attention_agrees(make_stack):
    pytest.importorskip("flash_attn")
    eager, flash = (
        make_stack("llama", backbone={"attention": name, "dtype": "bfloat16"}, **SGD)
        for name in ("eager", "flash_attention_2")
    )
    jobs = eager.jobs()
    found = distances(jobs, flash.alone(jobs), eager.alone(jobs))
    assert max(found) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cached_states_of_frozen_layers_change_nothing(make_bench, kind, precision):
    options = {"device": DEVICE, "mixed_precision": precision, "lora": {"dropout": 0.0}, **SGD}
    cached, plain = make_bench(kind, **options), make_bench(kind, cached=False, **options)
    for module in (*cached.backbone.model.modules(), *plain.backbone.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found, expected = cached.train(), plain.train()
    assert cached.used
    near = tolerance(torch.float32 if precision == "no" else torch.bfloat16)
    assert (found - expected).norm() <= near * (expected - plain.row).norm()
    torch.testing.assert_close(
        cached.losses(cached.row), plain.losses(plain.row), rtol=near, atol=near
    )


ROWS = [
    {"prompt": f"say {word}", "completion": f" {word} {client}", "client": client, "split": split}
    for client in ("clinic", "bank")
    for word in ("parcel", "refund", "password", "laptop")
    for split in ("train", "validation", "test")
]


def test_a_federation_on_4_bits_learns_and_predicts(tiny_models, tmp_path):
    """QLoRA with two clients a pass, gradient checkpointing and a paged 8-bit optimizer."""
    pytest.importorskip("bitsandbytes")
    run = run_of(
        tmp_path / "run",
        ROWS,
        {"name": "causal-lm", "metrics": ["perplexity"], "max_new_tokens": 4},
        backbone={
            "model": str(tiny_models / "llama"),
            "quantization": "4bit",
            "gradient_checkpointing": True,
        },
        lora={"r": 32, "target_modules": "all-linear"},
        training={
            "optimizer": "paged_adamw_8bit",
            "steps": 4,
            "clients_per_batch": 2,
            "device": DEVICE,
        },
        evaluation={"finetuned": False},
    )
    losses = run.metrics["train_loss"]
    assert float(losses.iloc[-1]) < 0.9 * float(losses.iloc[0])
    assert set(run.predict({"bank": ["say parcel"]})) == {"bank"}

"""Training several adapters in one pass equals training them one after another."""

import logging
import math
import re
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from equality import assert_near, tolerance
from fedmerge_peft import Recipe
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training import loop
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.batching import clients_per_batch
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache
from fedmerge_peft.training.runtime import Runtime
from oracle import train_plainly
from tasks.made_examples import KINDS, MADE

COUNT = 16
ROWS = np.arange(COUNT)
TARGETS = {
    "bert": ["query", "value"],
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["q_proj", "fc1"],
}


class Bench:
    """A tiny model without dropout, and four jobs that differ in every option of a job."""

    def __init__(
        self,
        folder,
        table_and_task,
        kind="bert",
        lora=None,
        backbone=None,
        cached=False,
        dropout=False,
        **training,
    ):
        training = {"learning_rate": 0.01, **training}
        table, task = table_and_task(kind, COUNT)
        model = folder / kind.partition("-")[0]
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": str(model), **(backbone or {})},
                "lora": {"r": 2, "target_modules": TARGETS[model.name], **(lora or {})},
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {"batch_size": 2, "epochs": 1, "device": "cpu", **training},
            }
        )
        self.accelerator = make_accelerator(self.recipe.training)
        self.task = make_task(self.recipe, table, str(model))
        self.backbone = load_backbone(
            self.recipe.backbone, self.recipe.lora, self.task, str(model), torch.device("cpu"), 0
        )
        for module in self.backbone.model.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        self.examples = self.task.encode(table)
        self.cache = (
            PrefixCache(self.backbone, self.task, self.examples, [ROWS], 1.0) if cached else None
        )

    def row(self, seed):
        """An adapter with no factor at zero, ``(P,)``."""
        row = self.backbone.fresh_row(seed)
        return row + 0.1 * torch.randn(len(row), generator=torch.Generator().manual_seed(seed))

    def jobs(self):
        """7, 5, 3 and 5 examples; an anchor, example weights, two phases of some columns."""
        head = torch.zeros(self.backbone.layout.size, dtype=torch.bool)
        head[: len(head) // 3] = True
        plans = [
            Train(self.row(0)),
            Train(self.row(1), proximal=0.5, anchor=self.row(9)),
            Train(self.row(2), example_weights=torch.tensor([0.3, 0.0, 2.0])),
            Train(self.row(3), phases=(head, ~head)),
        ]
        indices = [ROWS[:7], ROWS[7:12], ROWS[[12, 3, 8]], ROWS[11:]]
        return [
            Job(plan, rows, 100 + number)
            for number, (plan, rows) in enumerate(zip(plans, indices, strict=True))
        ]

    @property
    def runtime(self):
        return Runtime(self.backbone, self.task, self.accelerator, self.examples, self.cache)

    def plainly(self, jobs):
        return [train_plainly(self.runtime, self.recipe.training, job) for job in jobs]

    def alone(self, jobs):
        return [train(self.runtime, self.recipe.training, [job])[0] for job in jobs]

    def together(self, jobs):
        return train(self.runtime, self.recipe.training, jobs)

    def count(self, **changes):
        training = self.recipe.training.model_copy(update=changes)
        return clients_per_batch(self.runtime, training, ROWS)


@pytest.fixture
def make_bench(tiny_models, table_and_task):
    """``make_bench("gpt2", lora={...})``."""
    return partial(Bench, tiny_models, table_and_task)


SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}
CACHED = {"lora": {"layers_to_transform": [1]}, "cached": True}
CHECKPOINTED = {"kind": "llama", "backbone": {"gradient_checkpointing": True}}
CASES = {
    "bert": {},
    "gpt2, whose layers are Conv1D": {"kind": "gpt2"},
    "llama": {"kind": "llama"},
    "a decoder that classifies": {"kind": "llama-classifier"},
    "vit": {"kind": "vit"},
    "sgd with momentum and decay": {"kind": "gpt2", **SGD},
    "adamw with decay": {"weight_decay": 0.1},
    "rslora": {"lora": {"use_rslora": True, "r": 3}},
    "ranks and scales by layer": {
        "lora": {"rank_pattern": {"query": 4}, "alpha_pattern": {"value": 3.0}},
    },
    "one frozen A for all": {"lora": {"merge": "shared_a"}},
    "a LayerNorm and a linear layer train whole": {
        "lora": {"modules_to_save": ["LayerNorm", "intermediate.dense"]},
    },
    "a Conv1D trains whole": {
        "kind": "gpt2",
        "lora": {"modules_to_save": ["c_fc"], "target_modules": ["c_attn"]},
    },
    "a whole block trains": {"lora": {"modules_to_save": ["output"], "target_modules": ["query"]}},
    "clipping": {"max_grad_norm": 0.01},
    "no clipping": {"max_grad_norm": None, **SGD},
    "a proximal term for all": {"proximal": 1.0, **SGD},
    "accumulation": {"gradient_accumulation": 2, "epochs": 2},
    "accumulation of tokens": {"kind": "llama", "gradient_accumulation": 3},
    "a number of steps": {"steps": 3},
    "cosine and warmup": {"schedule": "cosine", "warmup": 0.3, "epochs": 3},
    "linear decay": {"schedule": "linear", "epochs": 2, **SGD},
    "checkpointing": CHECKPOINTED,
    "the prefix cache": CACHED,
    "the prefix cache of a decoder": {"kind": "llama", **CACHED, "epochs": 2},
    "the prefix cache of images": {"kind": "vit", **CACHED},
    "the prefix cache and checkpointing": {**CHECKPOINTED, **CACHED},
}


for task in MADE:
    kind = f"{KINDS[task]}-{task}"
    CASES[task] = {"kind": kind, "epochs": 2}
    CASES[f"the prefix cache of {task}"] = {"kind": kind, **CACHED}


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
def test_training_alone_and_together_equals_plain_peft(make_bench, case):
    bench = make_bench(**CASES[case])
    assert stacking_obstacle(bench.backbone) is None
    jobs = bench.jobs()
    plainly = bench.plainly(jobs)
    for trained in (bench.alone(jobs), bench.together(jobs)):
        for job, plain, ours in zip(jobs, plainly, trained, strict=True):
            assert ours.row.dtype == torch.float64
            assert_near(ours.row, plain.row, job.train.row)
            assert ours.loss == pytest.approx(plain.loss, rel=tolerance(torch.float32))
            assert ours.steps == plain.steps


@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16"}, {"kind": "llama", "backbone": {"dtype": "bfloat16"}}],
    ids=str,
)
@pytest.mark.equality
def test_half_precision_differs_by_its_rounding(make_bench, options):
    bench = make_bench(**{**SGD, **options})
    jobs = bench.jobs()
    for job, alone, together in zip(jobs, bench.alone(jobs), bench.together(jobs), strict=True):
        assert together.row.dtype == torch.float32
        error, moved = together.row - alone.row, alone.row - job.train.row
        assert (
            error.norm() <= tolerance(torch.bfloat16 if options else torch.float32) * moved.norm()
        )


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "llama-classifier", "vit"])
def test_each_adapter_gets_its_own_gradient(make_bench, kind, checkpointing):
    """Micro-batches differ in number and size, and some have example weights."""
    bench = make_bench(kind, backbone={"gradient_checkpointing": checkpointing})
    batches = [[ROWS[:3], ROWS[3:4]], [ROWS[4:9]], [ROWS[9:10], ROWS[10:12], ROWS[[2]]]]
    weights = [None, torch.rand(COUNT, generator=torch.Generator().manual_seed(0)), None]
    stack = AdapterStack(bench.backbone, torch.stack([bench.row(seed) for seed in range(3)]))
    bench.backbone.train()
    with stack.applied():
        means = accumulate(bench.runtime, stack, batches, weights)
    for row, found, mean, batch, each in zip(
        stack.rows, stack.gradient, means, batches, weights, strict=True
    ):
        slot = AdapterSlot(bench.backbone, row)
        (alone,) = accumulate(bench.runtime, slot, [batch], [each])
        assert found.dtype == torch.float64
        assert_near(found, slot.gradient[0])
        assert float(mean) == pytest.approx(float(alone), rel=tolerance(torch.float32))


def test_the_comparison_distinguishes_adapters(make_bench):
    """Other adapters, other examples and another order of examples give distant results."""
    bench = make_bench()
    jobs = bench.jobs()
    alone = bench.alone(jobs)
    swapped = bench.together(
        [Job(jobs[0].train, jobs[1].indices, jobs[0].seed), Job(jobs[0].train, jobs[0].indices, 7)]
    )
    for other in swapped:
        moved = alone[0].row - jobs[0].train.row
        assert (other.row - alone[0].row).norm() > 0.02 * moved.norm()


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_one_job_draws_the_dropout_masks_of_plain_peft(make_bench):
    bench = make_bench(dropout=True, lora={"dropout": 0.2}, **SGD)
    jobs = bench.jobs()[:1]
    (plain,), (alone,) = bench.plainly(jobs), bench.alone(jobs)
    assert_near(alone.row, plain.row, jobs[0].train.row)


def test_dropout_masks_follow_from_the_seeds_of_all_jobs_of_a_pass(make_bench):
    bench = make_bench(dropout=True, lora={"dropout": 0.2})
    jobs = bench.jobs()
    state = torch.get_rng_state()
    first, again, fewer = bench.together(jobs), bench.together(jobs), bench.together(jobs[:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.row, two.row) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0].row, fewer[0].row)


def test_the_model_is_restored_afterwards(make_bench):
    bench = make_bench()
    jobs, held = bench.jobs(), bench.backbone.row()
    first, gradient = bench.alone(jobs[:1])[0].row, bench.backbone.flat.grad.clone()
    bench.backbone.load_row(held)
    bench.together(jobs)
    assert torch.equal(bench.backbone.row(), held)
    bench.task.losses = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        bench.together(jobs)
    del bench.task.losses
    assert not any("forward" in vars(module) for module in bench.backbone.model.modules())
    assert torch.equal(bench.backbone.flat.grad, gradient)
    assert torch.equal(bench.alone(jobs[:1])[0].row, first)


def test_a_layers_own_forward_is_restored(make_bench):
    backbone = make_bench().backbone
    layer = next(
        module for name, module in backbone.model.named_modules() if name.endswith("query")
    )
    mine = layer.forward = lambda x: x
    with AdapterStack(backbone, backbone.row()[None]).applied():
        assert layer.forward is not mine
    assert layer.forward is mine


# ---- adapters that cannot be stacked -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora", "reason"),
    [
        (
            "bert",
            {"use_dora": True},
            r"DoRA's magnitudes are not low-rank updates \(lora\.use_dora\)",
        ),
        ("bert", {"bias": "lora_only"}, r"query\.base_layer\.bias is trainable, but"),
        ("bert", {"bias": "all"}, r"bias is trainable, but"),
        ("bert", {"trainable_token_indices": [5, 6]}, r"is trainable, but"),
        (
            "bert",
            {"modules_to_save": ["word_embeddings"]},
            r"word_embeddings.*weight is trainable, but",
        ),
        (
            "bert",
            {"target_modules": ["query", "word_embeddings"]},
            r"word_embeddings is not a plain linear layer \(Embedding, Embedding\)",
        ),
        (
            "vit",
            {"target_modules": ["projection"]},
            r"projection is not a plain linear layer \(Conv2d, Conv2d\)",
        ),
        (
            "llama",
            {"target_parameters": ["mlp.up_proj.weight"]},
            r"is not a plain linear layer \(Linear, ParamWrapper\)",
        ),
        ("llama", {"modules_to_save": ["norm"]}, r"norm\..*weight is trainable, but"),
    ],
    ids=str,
)
def test_adapters_without_an_exact_stack_train_one_at_a_time_and_log_the_reason(
    make_bench, caplog, kind, lora, reason
):
    bench = make_bench(kind, lora=lora)
    with caplog.at_level(logging.INFO):
        assert bench.count(clients_per_batch=4) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("batching")]
    assert line.startswith("clients train one at a time: ")
    assert re.search(reason, line)


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
    assert message.startswith("the gradients of 4 of 4 adapters overflowed in fp16 in each step")


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
    assert "is not a plain linear layer (Linear8bitLt, Linear8bitLt)" in caplog.text


def centred(module, args, output):
    return output - output.mean(0, keepdim=True)


def by_position(module, args):
    return (args[0].transpose(0, 1), *args[1:])


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda layer: layer.register_forward_hook(centred), "mix the examples of a batch"),
        (
            lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0].flip(0),)),
            "apply adapters in an unsupported way",
        ),
        (
            lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0][:1],)),
            "does not run with several adapters",
        ),
    ],
    ids=["mixed", "reordered", "one for all"],
)
def test_models_whose_batches_depend_on_each_other_are_detected(make_bench, caplog, alter, reason):
    bench = make_bench()
    assert bench.count(clients_per_batch=4) == 4
    alter(
        bench.backbone.model.get_submodule(
            "base_model.model.bert.encoder.layer.0.attention.self.query"
        )
    )
    with caplog.at_level(logging.INFO):
        assert bench.count(clients_per_batch=4) == 1
    assert reason in caplog.text


@pytest.mark.parametrize(("batch_size", "clients"), [(1, 8), (2, 4), (4, 1), (16, 1)])
def test_auto_gives_passes_of_eight_examples_on_a_cpu(make_bench, batch_size, clients):
    assert make_bench().count(batch_size=batch_size) == clients


def test_the_trial_leaves_no_trace(make_bench):
    bench = make_bench()
    held, state = bench.backbone.row(), torch.get_rng_state()
    assert bench.count() == 4
    assert torch.equal(bench.backbone.row(), held)
    assert torch.equal(torch.get_rng_state(), state)
    assert not bench.backbone.flat.grad.any()

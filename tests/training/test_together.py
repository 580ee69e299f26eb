"""Training several adapters in one pass equals training them one after another."""

import logging
import re
from functools import partial

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, ResNetConfig

from equality import assert_near, tolerance
from fedmerge_peft.models import tiny
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.loop import Job
from made_models import config_of, tokenizer_of, write
from tasks.made_examples import KINDS, MADE
from training.stack_bench import COUNT, ROWS, SGD, Bench


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory):
    """The tiny models, and ones with experts and with convolutions."""
    folder = tmp_path_factory.mktemp("models")
    for kind in tiny.KINDS:
        (folder / kind).symlink_to(tiny_models / kind)
    tokenizer = tokenizer_of(tiny_models, "llama")
    experts = {"num_local_experts": 4, "num_key_value_heads": 2}
    config = config_of("mixtral", tokenizer, **experts)
    eager = {"experts_implementation": "eager"}  # grouped products do not support float64
    write(folder / "mixtral", AutoModelForCausalLM, config, tokenizer, **eager)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = ResNetConfig(**sizes, layer_type="basic")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / "resnet")
    AutoImageProcessor.from_pretrained(tiny_models / "vit").save_pretrained(folder / "resnet")
    return folder


@pytest.fixture
def make_bench(models, table_and_task):
    """``make_bench("gpt2", lora={...})``."""
    return partial(Bench, models, table_and_task)


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
    "convolutions": {"kind": "resnet"},
    "the convolution of patches": {"kind": "vit", "lora": {"target_modules": ["projection"]}},
    "attention before experts": {"kind": "mixtral"},
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
            r"word_embeddings is neither a plain linear layer nor a convolution \(Embedding, Embed",
        ),
        (
            "llama",
            {"target_parameters": ["mlp.up_proj.weight"]},
            r"is neither a plain linear layer nor a convolution \(Linear, ParamWrapper\)",
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


def centered(module, args, output):
    return output - output.mean(0, keepdim=True)


def by_position(module, args):
    return (args[0].transpose(0, 1), *args[1:])


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda layer: layer.register_forward_hook(centered), "mix the examples of a batch"),
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

"""The last layer without the positions that no head reads, against all of them."""

import numpy as np
import pytest
import torch
import transformers

from equality import assert_near, tolerance
from fedmerge_peft import Recipe
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.evaluation import evaluate
from fedmerge_peft.training.first_token import cut_to_first_token
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.runtime import Runtime

COUNT = 12
ROWS = np.arange(COUNT)
TARGETS = {"bert": ["query", "output.dense"], "llama": ["q_proj"], "vit": ["q_proj"]}


@pytest.fixture
def make_runtime(tiny_models, table_and_task):
    """``make_runtime("bert")``: a tiny model with dropout, and its recipe."""

    def make(kind, folder=None, **options):
        table, task = table_and_task(kind, COUNT)
        model = str(folder or tiny_models / kind.partition("-")[0])
        recipe = Recipe.model_validate(
            {
                "name": "bench",
                "task": task,
                "backbone": {"model": model, **options},
                "lora": {"r": 2, "target_modules": TARGETS[kind.partition("-")[0]]},
                "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
                "training": {
                    "batch_size": 3,
                    "optimizer": "sgd",
                    "learning_rate": 0.1,
                    "epochs": 1,
                },
            }
        )
        accelerator = make_accelerator(recipe.training)
        task = make_task(recipe, table, model)
        device = torch.device("cpu")
        backbone = load_backbone(recipe.backbone, recipe.lora, task, model, device, 0)
        return Runtime(backbone, task, accelerator, task.encode(table)), recipe.training

    return make


def test_a_layer_whose_output_loses_padding_is_not_cut(make_runtime, tiny_models, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models / "bert")
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LongformerConfig(
        **sizes,
        vocab_size=len(tokenizer),
        intermediate_size=16,
        attention_window=2,
        max_position_embeddings=140,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LongformerModel(config).save_pretrained(tmp_path)
    runtime, _ = make_runtime("bert", tmp_path)
    odd = ROWS[runtime.examples.lengths % 2 == 1]
    assert len(odd)
    assert cut_to_first_token(runtime, odd) is None
    assert cut_to_first_token(runtime, ROWS) is None


def test_checkpointed_layers_are_not_cut_because_they_run_again_without_it(make_runtime):
    plain, training = make_runtime("bert")
    saving, _ = make_runtime("bert", gradient_checkpointing=True)
    saving.first_token = cut_to_first_token(saving, ROWS)
    assert saving.first_token is None
    (expected,), (found,) = (
        train(runtime, training, jobs(runtime, 1)) for runtime in (plain, saving)
    )
    assert_near(found.row, expected.row, plain.backbone.fresh_row(0))


def jobs(runtime, count):
    rows = [runtime.backbone.fresh_row(seed) for seed in range(count)]
    parts = np.array_split(ROWS, count)
    return [Job(Train(row), part, 7) for row, part in zip(rows, parts, strict=True)]


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("count", [1, 3])
def test_training_and_scores_are_those_of_all_positions_with_the_same_dropout(make_runtime, count):
    whole, training = make_runtime("bert")
    first, _ = make_runtime("bert")
    first.first_token = cut_to_first_token(first, ROWS)
    assert first.first_token is not None
    rows = [job.train.row for job in jobs(whole, count)]
    expected = train(whole, training, jobs(whole, count))
    found = train(first, training, jobs(first, count))
    for row, one, other in zip(rows, expected, found, strict=True):
        assert_near(other.row, one.row, row)
    scores = evaluate(whole, expected[0].row, ROWS, 5), evaluate(first, found[0].row, ROWS, 5)
    assert scores[1] == pytest.approx(scores[0], rel=tolerance(torch.float32))


def test_the_last_layer_runs_on_one_position(make_runtime):
    runtime, _ = make_runtime("bert")
    lengths = []
    layer = runtime.backbone.model.get_submodule("base_model.model.bert.encoder.layer")[-1]
    layer.register_forward_hook(lambda *call: lengths.append(call[-1].shape[1]))
    runtime.first_token = cut_to_first_token(runtime, ROWS)
    lengths.clear()
    evaluate(runtime, runtime.backbone.fresh_row(0), ROWS, 4)
    assert lengths == [1, 1, 1]


def test_a_head_that_reads_other_tokens_keeps_all_positions(make_runtime):
    runtime, _ = make_runtime("bert")
    pooler = runtime.backbone.model.get_submodule("base_model.model.bert.pooler")
    pooler.forward = lambda states: torch.tanh(pooler.dense(states.mean(dim=1)))
    assert cut_to_first_token(runtime, ROWS) is None


def test_a_model_that_fails_in_the_trial_is_left_to_training(make_runtime):
    """Training names the client and the cause."""
    runtime, _ = make_runtime("bert")

    def fail(*_):
        raise IndexError("index out of range in self")

    handle = runtime.backbone.model.register_forward_pre_hook(fail)
    assert cut_to_first_token(runtime, ROWS) is None
    handle.remove()
    assert cut_to_first_token(runtime, ROWS) is not None


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_layers_that_are_built_otherwise_are_left_alone(make_runtime, kind):
    runtime, _ = make_runtime(kind)
    assert cut_to_first_token(runtime, ROWS) is None

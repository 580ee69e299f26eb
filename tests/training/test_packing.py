"""Packed batches: results equal those of padded batches."""

import numpy as np
import pytest
import torch

from equality import assert_near, tolerance
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.models.packing import Packing
from fedmerge_peft.training.evaluation import evaluate, example_losses
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.labeled_head import labeled_head
from fedmerge_peft.training.packing_trial import require_packing
from training.prefix_bench import ROWS


def packed_runtime(bench, head=True):
    runtime = bench.runtime
    runtime.head = labeled_head(runtime, ROWS) if head else None
    require_packing(runtime, ROWS, bench.recipe)
    runtime.packed = True
    return runtime


def step(runtime, bench, adapters):
    """Mean losses and gradients of one step of two micro-batches of other sizes."""
    noise = torch.randn(adapters, len(bench.row), generator=torch.Generator().manual_seed(0))
    rows = bench.row + 0.1 * noise.to(bench.row)
    runtime.backbone.eval()
    stack = (
        AdapterSlot(runtime.backbone, rows[0])
        if adapters == 1
        else AdapterStack(runtime.backbone, rows)
    )
    chunks = [[ROWS[k : k + 5], ROWS[7 + k : 9 + 2 * k]] for k in range(adapters)]
    with torch.enable_grad(), stack.applied():
        losses = accumulate(runtime, stack, chunks)
    gradient = stack.gradient.clone()
    stack.gradient.zero_()
    return losses, gradient


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize(
    ("kind", "head", "cached"), [("gpt2", True, False), ("llama", False, True)]
)
def test_a_packed_step_equals_a_padded_one(make_bench, kind, head, cached, adapters):
    bench = make_bench(kind, cached=cached, lora={"dropout": 0.0})
    packed, padded = packed_runtime(bench, head), bench.runtime
    for found, expected in zip(
        *(step(each, bench, adapters) for each in (packed, padded)), strict=True
    ):
        assert found.dtype == torch.float64
        assert_near(found, expected)
    losses = [example_losses(each, bench.row, ROWS, 5) for each in (packed, padded)]
    assert_near(*losses)
    scores = [evaluate(each, bench.row, ROWS, 5) for each in (packed, padded)]
    assert scores[0] == pytest.approx(scores[1], rel=tolerance(torch.float64))
    if cached:
        assert bench.used


def test_packed_batches_have_fewer_positions(make_bench):
    bench = make_bench("llama", cached=False)
    shapes = []
    model = bench.backbone.model.get_base_model()
    runtimes = packed_runtime(bench), bench.runtime
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    for runtime in runtimes:
        example_losses(runtime, bench.row, ROWS, 12)
    handle.remove()
    (rows, length), (batch, longest) = shapes
    assert length == longest
    assert int(bench.examples.lengths.sum()) <= rows * length < batch * longest


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bert", "token_type_ids"), ("llama-classifier", "one output for each example")],
)
def test_tasks_without_logits_of_tokens_are_refused(make_bench, kind, reason):
    lora = {"layers_to_transform": None} if kind == "bert" else None
    bench = make_bench(kind, cached=False, lora=lora)
    with pytest.raises(BackboneError, match=f"training.packing: .*{reason}"):
        require_packing(bench.runtime, ROWS, bench.recipe)


def ignore_positions(inputs):
    return {key: value for key, value in inputs.items() if key != "position_ids"}


def refuse_positions(inputs):
    if "position_ids" in inputs:
        raise TypeError("unexpected argument position_ids")
    return inputs


@pytest.mark.parametrize(
    ("change", "reason"),
    [(ignore_positions, "may affect each other"), (refuse_positions, "TypeError: unexpected")],
)
def test_models_without_such_attention_are_refused(make_bench, change, reason):
    bench = make_bench("llama", cached=False)
    bench.backbone.model.get_base_model().register_forward_pre_hook(
        lambda _, args, inputs: (args, change(inputs)), with_kwargs=True
    )
    with pytest.raises(BackboneError, match=reason):
        require_packing(bench.runtime, ROWS, bench.recipe)


def test_rows_hold_whole_examples_and_keep_their_order():
    lengths = [3, 2, 5, 1, 4, 1]
    mask = torch.tensor([[1] * each + [0] * (5 - each) for each in lengths])
    values = torch.arange(30).view(6, 5) * mask
    for adapters, rows in ((1, 4), (2, 4)):
        packing = Packing(mask, adapters)
        packed = packing.pack(values)
        assert packed.shape == (rows, 5)
        assert torch.equal(packing.unpack(packed), values)
        selected = packing.pack(mask * (values % 2)).bool()
        wanted = values[mask.bool() & (values % 2 == 1)]
        assert packing.in_order(packed[selected], selected).tolist() == wanted.tolist()
        starts = packing.pack(torch.nn.functional.one_hot(torch.zeros(6).long(), 5)).bool()
        assert (packing.positions[starts] == 0).all()
        assert np.array_equal(np.sort(packed[packed > 0]), np.sort(values[values > 0]))

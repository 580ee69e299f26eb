"""Messages survive a round trip bit by bit, and everything malformed is refused."""

import pickle

import pytest
import torch

from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.sites.messages import (
    assignment_message,
    read_assignment,
    read_reply,
    reply_message,
)
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import (
    Alignment,
    Choose,
    InTurn,
    MeasuredTrain,
    Mixture,
    Train,
    UpdatePrivacy,
)

P = 5
LAYOUT = "a" * 64


def row(seed=0, *shape):
    return torch.randn(*(shape or (P,)), generator=torch.Generator().manual_seed(seed))


TRAIN = Train(
    row(),
    (None, torch.tensor([True, False, True, True, False])),
    0.5,
    row(1),
    None,
    UpdatePrivacy(1.5, 0.1),
    logits="adjusted",
)
MIXTURE = Mixture(row(3, 2, P), torch.tensor([0.3, 0.7]))
PLANS = {
    "train": TRAIN,
    "compared": Train(row(10), compared=row(11)),
    "in_turn": InTurn((Train(row(4)), Train(row(5), anchor=row(4)))),
    "choose": Choose(row(6, 3, P)),
    "mixture": MIXTURE,
    "none": None,
}


def plain(value):
    """Return a plan as plain values, with tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return (
        [type(value).__name__, {key: plain(item) for key, item in vars(value).items()}]
        if hasattr(value, "__dict__")
        else value
    )


def received(plan, served, dtype="float32", base=None, hyperparameters=None):
    rates = hyperparameters or Hyperparameters()
    work = served if plan is None else Assignment(plan, served, rates)
    message = assignment_message(3, "clinic ü", work, base or {}, LAYOUT, dtype)
    return Message.from_bytes(message.to_bytes())


@pytest.mark.parametrize("served", [None, row(7), MIXTURE], ids=["none", "row", "mixture"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_plan_and_served_adapter_arrives_bit_by_bit(plan, served):
    message = received(plan, served, base={"layer.0": row(8, 2, 3)})
    assignment = read_assignment(message, LAYOUT, P, "float32")
    assert (assignment.round, assignment.client) == (3, "clinic ü")
    assert plain(assignment.plan) == plain(plan)
    assert plain(assignment.served) == plain(served)
    assert assignment.base["layer.0"].tolist() == row(8, 2, 3).tolist()


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        (MeasuredTrain(row(), statistics_shape=(2, 3, 4)), "sites cannot return class statistics"),
        (Train(row(), alignment=Alignment(row(1, 3, 2), 1.0)), "sites cannot align features"),
        (Train(row(), example_weights=torch.ones(3)), "sites cannot weight examples"),
    ],
)
def test_plans_that_need_features_are_refused(plan, fault):
    with pytest.raises(FederateError, match=fault):
        received(plan, None)


@pytest.mark.parametrize(
    "values", [Hyperparameters(), Hyperparameters(0.003), Hyperparameters(10.0, 4)], ids=str
)
def test_hyperparameters_arrive_unchanged(values):
    message = received(TRAIN, None, hyperparameters=values)
    assert read_assignment(message, LAYOUT, P, "float32").hyperparameters == values


def test_an_adapter_that_is_trained_and_evaluated_is_sent_once():
    both, one = (len(received(Train(row()), served).tensors) for served in (row(), None))
    assert both == one == 1


def test_bfloat16_halves_the_bytes_and_rounds_to_its_numbers():
    big = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    sizes = [
        len(assignment_message(1, "a", Assignment(Train(big)), {}, LAYOUT, dtype).to_bytes())
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[1] < 0.52 * sizes[0]
    message = Message.from_bytes(
        assignment_message(1, "a", Assignment(Train(big)), {}, LAYOUT, "bfloat16").to_bytes()
    )
    read = read_assignment(message, LAYOUT, 10_000, "bfloat16").plan.row
    assert read.dtype == torch.float32
    assert torch.equal(read, big.bfloat16().float())


@pytest.mark.parametrize(
    ("layout", "columns", "dtype", "error"),
    [
        ("b" * 64, P, "float32", "layout"),
        (LAYOUT, P + 1, "float32", "columns"),
        (LAYOUT, P, "bfloat16", "the federation uses"),
    ],
)
def test_another_layout_size_or_number_format_is_refused(layout, columns, dtype, error):
    with pytest.raises(WireError, match=error):
        read_assignment(received(TRAIN, None), layout, columns, dtype)


@pytest.mark.parametrize(
    "payload",
    [b"", b"x" * 7, b"\xff" * 40, pickle.dumps({"a": 1}), (2).to_bytes(8, "little") + b"{}"],
)
def test_bytes_that_are_not_a_message_are_refused(payload):
    with pytest.raises(WireError, match="cannot be read"):
        Message.from_bytes(payload)


@pytest.mark.parametrize(
    "fields",
    [
        {"plan": {"name": "exec"}},
        {"plan": {"name": "train"}},
        {"plan": {"name": "train", "row": "t9"}},
        {"plan": []},
        {"served": {"row": ["t0"]}},
        {"base": []},
        {"round": "x"},
        {"hyperparameters": None},
        {"hyperparameters": {"steps": 10**9}},
        *(
            {"hyperparameters": {"learning_rate": rate}}
            for rate in (0, -1e-3, 10.5, float("nan"), float("inf"), True, "1e-3", [1e-3])
        ),
        *({"hyperparameters": {"epochs": epochs}} for epochs in (0, 5, 1.0, True, "2")),
    ],
    ids=str,
)
def test_a_malformed_message_is_refused(fields):
    message = received(TRAIN, None)
    with pytest.raises(WireError):
        read_assignment(
            Message("train", {**message.fields, **fields}, message.tensors), LAYOUT, P, "float32"
        )


@pytest.mark.parametrize("logits", ["balanced", 1, ["plain"]])
def test_unknown_logits_are_refused(logits):
    message = received(TRAIN, None)
    plan = {**message.fields["plan"], "logits": logits}
    with pytest.raises(WireError, match="logits"):
        read_assignment(
            Message("train", {**message.fields, "plan": plan}, message.tensors),
            LAYOUT,
            P,
            "float32",
        )


def reply(**changes):
    values = {
        "client": 2,
        "deltas": row(9, 2, P),
        "size": 7,
        "train_loss": 0.125,
        "seconds": 1.5,
        "round": 4,
        "choice": 1,
    }
    return Reply(
        **{**values, "weights": torch.tensor([0.4, 0.6]), "served": {"test_loss": 0.5}, **changes}
    )


@pytest.mark.parametrize("losses", [None, (0.5, 0.25), (0.5, 0.25, 1.0)])
def test_a_reply_arrives_bit_by_bit(losses):
    sent = reply(validation=losses)
    message = Message.from_bytes(reply_message(sent, "a", LAYOUT, "float32").to_bytes())
    assert plain(read_reply(message, 2, "a", LAYOUT, P, "float32")) == plain(sent)


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        ({"client": "b"}, {}),
        ({"layout": "b" * 64}, {}),
        ({"num_examples": None}, {}),
        ({"served": [1]}, {}),
        ({"served": {"a": "x"}}, {}),
        ({"validation": [0.5]}, {}),
        ({"validation": [0.5] * 4}, {}),
        ({"validation": [0.5, 1e400]}, {}),
        ({}, {"deltas": row(1, 2, P + 1)}),
        ({}, {"deltas": row(1, P)[0]}),
        ({}, {"deltas": row(1, 2, P).double()}),
        ({}, {"weights": torch.ones(2, dtype=torch.int64)}),
    ],
)
def test_a_malformed_reply_or_a_reply_of_another_client_is_refused(fields, tensors):
    message = reply_message(reply(), "a", LAYOUT, "float32")
    altered = Message("trained", {**message.fields, **fields}, {**message.tensors, **tensors})
    with pytest.raises(WireError):
        read_reply(altered, 2, "a", LAYOUT, P, "float32")

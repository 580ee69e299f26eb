"""Messages hold what was put into them, and nothing else is taken for one."""

import pickle

import pytest
import torch

from fedmerge_peft.errors import WireError
from fedmerge_peft.sites.messages import (
    Message,
    assignment_message,
    read_assignment,
    read_reply,
    reply_message,
)
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.plan import Choose, InTurn, Mixture, Train, UpdatePrivacy

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
)
MIXTURE = Mixture(row(3, 2, P), torch.tensor([0.3, 0.7]))
PLANS = {
    "train": TRAIN,
    "in_turn": InTurn((Train(row(4)), Train(row(5), anchor=row(4)))),
    "choose": Choose(row(6, 3, P)),
    "mixture": MIXTURE,
    "none": None,
}


def parts(value):
    """A plan as plain values, tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return [parts(each) for each in value]
    return (
        [type(value).__name__, {key: parts(each) for key, each in vars(value).items()}]
        if hasattr(value, "__dict__")
        else value
    )


def sent(plan, served, dtype="float32", base=None):
    return Message.from_bytes(
        assignment_message(3, "clinic ü", plan, served, base or {}, LAYOUT, dtype).to_bytes()
    )


@pytest.mark.parametrize("served", [None, row(7), MIXTURE], ids=["none", "row", "mixture"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_plan_and_everything_served_arrives_bit_by_bit(plan, served):
    work = read_assignment(sent(plan, served, base={"layer.0": row(8, 2, 3)}), LAYOUT, P, "float32")
    assert (work.round, work.client) == (3, "clinic ü")
    assert parts(work.plan) == parts(plan)
    assert parts(work.served) == parts(served)
    assert work.base["layer.0"].tolist() == row(8, 2, 3).tolist()


def test_no_server_singles_an_example_out():
    """Weights of examples are a client's own business (FedEM's); in a message they are not read."""
    plan = Train(row(), example_weights=torch.tensor([1.0, 0.0]))
    assert read_assignment(sent(plan, None), LAYOUT, P, "float32").plan.example_weights is None


def test_what_is_trained_and_scored_alike_travels_once():
    both, one = (len(sent(Train(row()), served).tensors) for served in (row(), None))
    assert both == one == 1


def test_bfloat16_halves_the_bytes_and_rounds_to_its_numbers():
    big = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    sizes = [
        len(assignment_message(1, "a", Train(big), None, {}, LAYOUT, dtype).to_bytes())
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[1] < 0.52 * sizes[0]
    message = Message.from_bytes(
        assignment_message(1, "a", Train(big), None, {}, LAYOUT, "bfloat16").to_bytes()
    )
    read = read_assignment(message, LAYOUT, 10_000, "bfloat16").plan.row
    assert read.dtype == torch.float32
    assert torch.equal(read, big.bfloat16().float())


@pytest.mark.parametrize(
    ("layout", "columns", "dtype", "said"),
    [
        ("b" * 64, P, "float32", "layout"),
        (LAYOUT, P + 1, "float32", "columns"),
        (LAYOUT, P, "bfloat16", "was agreed"),
    ],
)
def test_another_layout_size_or_number_format_is_refused(layout, columns, dtype, said):
    with pytest.raises(WireError, match=said):
        read_assignment(sent(TRAIN, None), layout, columns, dtype)


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 7, b"\xff" * 40, pickle.dumps({"a": 1}), (2).to_bytes(8, "little") + b"{}"],
)
def test_bytes_that_are_no_message_are_refused(content):
    with pytest.raises(WireError, match="no message"):
        Message.from_bytes(content)


@pytest.mark.parametrize(
    "facts",
    [
        {"plan": {"name": "exec"}},
        {"plan": {"name": "train"}},
        {"plan": {"name": "train", "row": "t9"}},
        {"plan": []},
        {"served": {"row": ["t0"]}},
        {"base": []},
        {"round": "x"},
    ],
    ids=str,
)
def test_a_message_of_another_form_is_refused(facts):
    message = sent(TRAIN, None)
    with pytest.raises(WireError):
        read_assignment(
            Message("train", {**message.facts, **facts}, message.tensors), LAYOUT, P, "float32"
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


def test_a_reply_arrives_bit_by_bit():
    message = Message.from_bytes(reply_message(reply(), "a", LAYOUT, "float32").to_bytes())
    assert parts(read_reply(message, 2, "a", LAYOUT, P, "float32")) == parts(reply())


@pytest.mark.parametrize(
    ("facts", "tensors"),
    [
        ({"client": "b"}, {}),
        ({"layout": "b" * 64}, {}),
        ({"size": None}, {}),
        ({"served": [1]}, {}),
        ({"served": {"a": "x"}}, {}),
        ({}, {"deltas": row(1, 2, P + 1)}),
        ({}, {"deltas": row(1, P)[0]}),
        ({}, {"deltas": row(1, 2, P).double()}),
        ({}, {"weights": torch.ones(2, dtype=torch.int64)}),
    ],
)
def test_a_reply_of_another_form_or_client_is_refused(facts, tensors):
    message = reply_message(reply(), "a", LAYOUT, "float32")
    bent = Message("reply", {**message.facts, **facts}, {**message.tensors, **tensors})
    with pytest.raises(WireError):
        read_reply(bent, 2, "a", LAYOUT, P, "float32")

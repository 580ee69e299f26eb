"""Values out of range are refused by name; the round and the other sites go on."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fedmerge_peft import Run
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.sites import fields as kinds
from fedmerge_peft.sites.messages import (
    assignment_message,
    read_assignment,
    read_reply,
    reply_message,
)
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.server.roster import ROSTER_FILE, Roster
from fedmerge_peft.sites.wire import MAX_HEADER, Message
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.plan import InTurn, Mixture, Train, UpdatePrivacy
from sites.range_table import table

P = 5
LAYOUT = "a" * 64
MASK = torch.tensor([True, False, True, True, False])
TRAIN = Train(torch.ones(P), (None, MASK), 0.5, 2 * torch.ones(P), None, UpdatePrivacy(1.5, 0.1))
MIXTURE = Mixture(torch.ones(2, P), torch.tensor([0.3, 0.7]))
REPLY = Reply(2, torch.ones(1, P), 7, 0.1, 1.5, {"test_loss": 0.5}, {"test_loss": 0.4}, 1, None, 4)
RATES = Hyperparameters(0.01, 2)

EXTREMES = [
    None,
    True,
    -1,
    10**12,
    10**400,
    -1e-9,
    1e300,
    -1e300,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "x" * 2**21,
    "\x1b[2J",
    "<b>&",
    "\u202e",
    "\ud800",
    [],
    [0] * 5000,
    {},
    {str(number): 0.5 for number in range(5000)},
    [[[[]]]],
]


def assignment(plan, served=None):
    base = {"layer.0": torch.ones(2, 3)}
    work = served if plan is None else Assignment(plan, served, RATES)
    return assignment_message(3, "clinic", work, base, LAYOUT, "float32")


MESSAGES = {
    "train": assignment(TRAIN, torch.ones(P)),
    "in_turn": assignment(InTurn((Train(torch.ones(P)), TRAIN))),
    "mixture": assignment(MIXTURE, MIXTURE),
    "evaluate": assignment(None, torch.ones(P)),
    "trained": reply_message(REPLY, "clinic", LAYOUT, "float32"),
    "enroll": Message("enroll", {"recipe": "rounds: 1", "dtype": "float32"}),
    "enrolled": Message(
        "enrolled",
        {
            "clients": [{"name": "a", "group": "", "train": 3, "validation": 0, "test": 1}],
            "labels": ["no", "yes"],
            "format": None,
            "columns": ["text", "label"],
        },
    ),
    "open": Message("open", {"labels": ["no", "yes"], "format": None, "layout": LAYOUT}),
    "opened": Message("opened", {"layout": LAYOUT, "size": 5, "counts": [[1, 2]]}),
    "evaluated": Message("evaluated", {"client": "a", "scores": {"test_loss": 0.5}}),
    "error": Message("error", {"error": "no luck", "refused": False}),
    "adapter": Message("adapter", {"client": "a", "README.md": "# a", "weights.json": "{}"}),
}
READERS = {
    "train": lambda message: read_assignment(message, LAYOUT, P, "float32"),
    "evaluate": lambda message: read_assignment(message, LAYOUT, P, "float32"),
    "trained": lambda message: read_reply(message, 2, "clinic", LAYOUT, P, "float32"),
    "enroll": lambda message: kinds.read_fields(kinds.Enroll, message),
    "enrolled": lambda message: kinds.read_fields(kinds.Enrolled, message),
    "open": lambda message: kinds.read_fields(kinds.Open, message),
    "opened": lambda message: kinds.read_fields(kinds.Opened, message),
    "evaluated": lambda message: kinds.read_fields(kinds.Evaluated, message),
    "error": lambda message: kinds.read_fields(kinds.Failure, message),
    "adapter": lambda message: kinds.read_fields(kinds.StoreAdapter, message),
}


def paths(value, here=()):
    """Yield the path of every field and of every element."""
    if here:
        yield here
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            yield from paths(child, (*here, key))


def altered(fields, path, value):
    fields = copy.deepcopy(fields)
    target = fields
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return fields


def numbers(value):
    """All numbers in what a reader returned."""
    if isinstance(value, torch.Tensor):
        yield from value.double().flatten().tolist()
    elif isinstance(value, int | float):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from numbers(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from numbers(child)
    elif hasattr(value, "__dict__"):
        yield from numbers(vars(value))


def texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            for child in pair:
                yield from texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from texts(child)
    elif hasattr(value, "__dict__"):
        yield from texts(vars(value))


@pytest.mark.parametrize("name", MESSAGES)
def test_each_field_is_refused_or_in_range_whatever_it_holds(name):
    message = MESSAGES[name]
    read = READERS[message.kind]
    read(message)
    refusals = []
    for path in paths(json.loads(json.dumps(message.fields))):
        for extreme in EXTREMES:
            changed = altered(message.fields, path, extreme)
            try:
                accepted = read(Message(message.kind, changed, message.tensors))
            except WireError as error:
                refusals.append(str(error))
                continue
            assert all(abs(number) <= 1e30 for number in numbers(accepted)), (path, extreme)
            assert all(len(text) <= 2**20 for text in texts(accepted)), (path, extreme)
    assert refusals
    assert all(len(text) < 500 and text.isprintable() for text in refusals)


@pytest.mark.parametrize("name", [name for name in MESSAGES if MESSAGES[name].tensors])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensor: tensor * math.nan,
        lambda tensor: tensor * math.inf,
        lambda tensor: torch.full_like(tensor, 3e38),
        lambda tensor: -tensor.abs() * 1e20,
        lambda tensor: tensor[..., :0],
        lambda tensor: tensor[None],
        lambda tensor: tensor.double(),
    ],
)
def test_each_tensor_is_refused_if_it_is_extreme(name, spoil):
    message = MESSAGES[name]
    for key, tensor in message.tensors.items():
        if tensor.is_floating_point():
            changed = {**message.tensors, key: spoil(tensor)}
            with pytest.raises(WireError):
                READERS[message.kind](Message(message.kind, message.fields, changed))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"privacy": {"clip": -1e9, "noise": 0.0}}, "privacy.clip is -1000000000.0: expected"),
        ({"privacy": {"clip": 0.0, "noise": 0.0}}, "greater than 0"),
        ({"privacy": {"clip": math.nan, "noise": 0.0}}, "privacy.clip is nan"),
        ({"privacy": {"clip": math.inf, "noise": 0.0}}, "privacy.clip is inf"),
        ({"privacy": {"clip": 1.0, "noise": -1.0}}, "privacy.noise is -1.0"),
        ({"proximal": -1e6}, "proximal is -1000000.0"),
        ({"phases": [None] * 500}, "at most 64 items"),
        ({"phases": []}, "at least 1 item"),
    ],
)
def test_a_site_names_the_value_of_a_plan_that_it_refuses(change, fault):
    message = MESSAGES["train"]
    plan = {**message.fields["plan"], **change}
    with pytest.raises(WireError, match=r"the train message is refused: plan\.train") as error:
        READERS["train"](Message("train", {**message.fields, "plan": plan}, message.tensors))
    assert fault in str(error.value)


def test_a_mixtures_weights_are_a_distribution():
    for weights in ([-1.0, 2.0], [0.3, 0.3], [1.0]):
        with pytest.raises(WireError, match="a mixture of 2 adapters: its weights are"):
            READERS["train"](assignment(Mixture(torch.ones(2, P), torch.tensor(weights))))


def test_long_fields_are_refused_before_they_are_parsed():
    payload = Message("error", {"error": "x" * MAX_HEADER, "refused": True}).to_bytes()
    with pytest.raises(WireError, match="the header of a message has"):
        Message.from_bytes(payload)


# ---- whole jobs ----------------------------------------------------------------------------------


def rewritten(reply, **changes):
    message = Message.from_bytes(reply)
    return Message(message.kind, {**message.fields, **changes}, message.tensors).to_bytes()


def with_number(reply, **changes):
    summary = Message.from_bytes(reply).fields
    return rewritten(reply, clients=[{**summary["clients"][0], **changes}])


ENROLMENTS = {
    "site-1": (lambda reply: with_number(reply, train=10**12), "clients.0.train is 1000000000000"),
    "site-2": (lambda reply: rewritten(reply, labels=None), "must have labels"),
    "site-3": (
        lambda reply: rewritten(reply, labels=[f"label {number}" for number in range(5000)]),
        "5000 of the 5000 labels of its data occur at no other site",
    ),
    "site-4": (
        lambda reply: rewritten(reply, columns=[f"column {n}" for n in range(100_000)]),
        "columns is",
    ),
    "site-5": (lambda reply: with_number(reply, group="\x1b[2J"), "clients.0.group is"),
}


def test_sites_that_enroll_with_extreme_values_are_left_out_by_name(smoke, federation_of, connect):
    kit, trainers = federation_of(
        smoke("rounds=1", "data.max_train=32", "clients.failures=skip"), 6
    )
    transport = connect(trainers)

    def alter(site, payload, reply):
        if Message.from_bytes(payload).kind != "enroll" or site not in ENROLMENTS:
            return reply
        return ENROLMENTS[site][0](reply)

    transport.alter = alter
    outcome = run_job(kit, transport, lambda: None, lambda line: None)
    assert outcome.state == "ended", outcome.error
    assert outcome.absent.keys() == ENROLMENTS.keys()
    for site, (_, reason) in ENROLMENTS.items():
        assert reason in outcome.absent[site]
    (record,) = Run.open(kit / "run").records
    assert len(record["clients"]) == 1


REPLIES = [
    (lambda reply: rewritten(reply, served={"validation_loss": -1e300}), "expected greater than"),
    (lambda reply: rewritten(reply, served={"test_loss": -1.0}), "test_loss is -1, expected"),
    (lambda reply: rewritten(reply, served={"test_loss": 10**400}), "served.test_loss is 1000"),
    (lambda reply: rewritten(reply, finetuned={"<b>": 0.5}), "a score that the task does not have"),
    (
        lambda reply: rewritten(reply, finetuned={f"s{n}": 0.5 for n in range(200_000)}),
        "finetuned is",
    ),
    (
        lambda reply: Message("error", {"error": "x" * 10**7, "refused": False}).to_bytes(),
        "the error message is refused: error is",
    ),
]


def test_clients_that_reply_with_extreme_values_are_left_out_by_name(smoke, federation_of, connect):
    kit, trainers = federation_of(
        smoke("rounds=2", "data.max_train=32", "clients.failures=skip"), 6
    )
    transport = connect(trainers)
    attacked = []

    def alter(site, payload, reply):
        message = Message.from_bytes(payload)
        if message.kind == "evaluate" and site == "site-1":
            return rewritten(reply, scores={"test_loss": math.nan})
        if message.kind != "train" or site == "site-6" or message.fields["round"] != 1:
            return reply
        attacked.append(message.fields["client"])
        return REPLIES[len(attacked) - 1][0](reply)

    transport.alter = alter
    outcome = run_job(kit, transport, lambda: None, lambda line: None)
    assert outcome.state == "ended", outcome.error
    run = Run.open(kit / "run")
    first, second = run.records
    assert list(first["failures"]) == attacked
    for cause, (_, reason) in zip(first["failures"].values(), REPLIES, strict=False):
        assert reason in cause
        assert len(cause) < 500
    assert not second["failures"]
    assert run.soup.rows.isfinite().all()
    assert attacked[0] not in run.summary["last"]["served"]["clients"]


def test_a_site_refuses_a_plan_out_of_range_without_training(smoke, federation_of, connect):
    kit, trainers = federation_of(smoke("rounds=1", "strategy=fedavg"), 2)
    transport = connect(trainers)
    run_job(kit, transport, lambda: None, lambda line: None)
    payload = next(
        payload
        for site, payload in transport.sent
        if site == "site-1" and Message.from_bytes(payload).kind == "train"
    )
    trainer = trainers["site-1"]
    trained = []
    trainer._engine.train_clients = lambda *_: trained.append(1)
    message = Message.from_bytes(payload)
    plan = {**message.fields["plan"], "privacy": {"clip": -1e9, "noise": 0.0}}
    reply = Message.from_bytes(trainer.handle(rewritten(payload, plan=plan)))
    assert (reply.kind, reply.fields["refused"], trained) == ("error", True, [])
    assert "plan.train.privacy.clip is -1000000000.0: expected" in reply.fields["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"train": -1},
        {"train": 10**12},
        {"counts": [math.nan]},
        {"group": "\x1b[2J"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_roster_out_of_range_is_one_error(tmp_path, change):
    entry = {"group": "", "train": 3, "validation": 0, "test": 0, "counts": [1, 2]}
    roster = Roster(["a", "b"], None, ["text"], {"c": entry})
    roster.write(tmp_path)
    assert Roster.read(tmp_path) == roster
    document = {**asdict(roster), "clients": {"c": {**entry, **change}}}
    (tmp_path / ROSTER_FILE).write_text(json.dumps(document))
    with pytest.raises(FederateError, match=f"{ROSTER_FILE}: damaged"):
        Roster.read(tmp_path)


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 2**21])
def test_a_client_of_the_roster_with_a_name_out_of_range_is_one_error(tmp_path, name):
    entry = {"group": "", "train": 3, "validation": 0, "test": 0, "counts": None}
    document = {**asdict(Roster(None, None, ["text"])), "clients": {name: entry}}
    (tmp_path / ROSTER_FILE).write_text(json.dumps(document))
    with pytest.raises(FederateError, match=f"{ROSTER_FILE}: damaged") as raised:
        Roster.read(tmp_path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_the_threat_model_lists_all_fields_with_their_ranges():
    page = Path(__file__).parents[2] / "docs" / "threat_model.md"
    assert table() in page.read_text()

"""Runs that are interrupted between rounds resume to the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from federation.small_recipe import recipe
from fedmerge_peft import (
    Callback,
    RecipeError,
    ResumeError,
    Run,
    RunError,
    RunExistsError,
    federate,
    resume,
)
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.util import checked
from fedmerge_peft.util.stateful import Stateful

TINY = [
    "data.max_train=4",
    "data.max_test=2",
    "evaluation.finetuned=false",
    "rounds=4",
    "clients.fraction=0.5",
]

VARIANTS = [
    *({"name": entry.name} for entry in STRATEGIES if entry.name != "femam"),
    {"name": "femam", "levels": 2},  # as many as ranks
    {
        "name": "fedmerge",
        "adapters": 3,
        "rule": "adam",
        "weights_memory": 0.5,
        "balance_rounds": 3,
        "reseed_after": 1,
    },
    # stopped before the grouping
    {
        "name": "fedmerge",
        "adapters": 3,
        "start": "warm",
        "warm_rounds": 3,
    },
    # and after it
    {
        "name": "fedmerge",
        "adapters": 3,
        "start": "warm",
        "warm_rounds": 1,
        "server_optimizer": "adam",
    },
    # with groups and heads that the run has decided on
    {"name": "fedmerge", "warm_rounds": 1, "own_head": True},
    {"name": "fedmerge", "warm_rounds": 1, "head": "private"},
    *[
        {"name": "fedmerge", "server_momentum": 0.0, "soup": soup, **start}
        for soup in (
            {"dtype": "bfloat16"},
            {"storage": "disk"},
            {"dtype": "bfloat16", "storage": "disk"},
        )
        for start in ({"adapters": 3, "start": "independent"}, {"warm_rounds": 1})
    ],
    {"name": "fedavg_ft", "head": "private"},
    {"name": "fedex_lora", "head": "private"},
    {"name": "fedavg", "server_optimizer": "adam"},
    # stopped after its first round of finetuning
    {"name": "fedavg_ft", "fedavg_rounds": 1, "passes": 2},
    {"name": "fesem", "adapters": 6},  # waits for its last clients
    {"name": "flhc", "adapters": 2, "warm_rounds": 3},
    {"name": "flexlora", "ranks": [1, 2]},
    {"name": "flora", "ranks": [1, 2]},
]
MOMENTUM = (
    "fedmerge",
    "fedavg",
    "fedavg_ft",
    "fedprox",
    "ditto",
    "fedper",
    "fedrep",
    "fedrod",
    "feddpa",
    "ffa_lora",
    "fedsa_lora",
    "rolora",
)


@pytest.fixture(scope="module")
def engine(smoke):
    return LocalEngine.from_recipe(smoke(*TINY))


@pytest.fixture(scope="module")
def uninterrupted(smoke, engine, tmp_path_factory, left_behind):
    """The contents of the directory of an uninterrupted run of ``tiny()``."""
    return left_behind(
        federate(smoke(*TINY), tmp_path_factory.mktemp("runs") / "whole", engine=engine).path
    )


@pytest.fixture
def tiny(smoke):
    """``tiny(overrides)``: the recipe that ``engine`` was loaded for."""
    return lambda *overrides: smoke(*TINY, *overrides)


def stop_after(number, strategy=None):
    """Options that interrupt a run after a round."""
    names = []

    def start(federation, _):
        names.append(federation.recipe.strategy.name)

    def interrupt(record):
        if record.round == number and strategy in (None, names[-1]):
            raise KeyboardInterrupt

    return {"callbacks": [Callback(on_start=start, on_round=interrupt)]}


def interrupted(recipe, path, engine, after=2, strategy=None):
    with pytest.raises(KeyboardInterrupt):
        federate(recipe, path, engine=engine, **stop_after(after, strategy))
    return path


def numbers(thing):
    """Numbers and flags of an object, at any depth, by dotted name."""
    found = {}
    for name, value in vars(thing).items():
        if isinstance(value, torch.Tensor):
            found[name] = value.clone()
        elif isinstance(value, int | None):
            found[name] = value
        elif isinstance(value, Stateful):
            found |= {f"{name}.{key}": inner for key, inner in numbers(value).items()}
    return found


def same(one, other):
    return (
        torch.equal(one, other)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        else one is other or one == other
    )


@pytest.mark.parametrize(
    "strategy", VARIANTS, ids=lambda strategy: "-".join(map(str, strategy.values()))
)
def test_two_rounds_and_two_more_equal_four(tiny, engine, tmp_path, left_behind, strategy):
    momentum = {"server_momentum": 0.5} if strategy["name"] in MOMENTUM else {}
    recipe = tiny(f"strategy={json.dumps({**momentum, **strategy})}")
    federations = []

    def start(federation, _):
        federations.append((federation, numbers(federation.strategy)))

    def copy(record):
        if record.round == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "parts")

    whole = federate(
        recipe,
        tmp_path / "whole",
        engine=engine,
        callbacks=[Callback(on_start=start, on_round=copy)],
    )
    rounds = []
    resume(
        tmp_path / "parts",
        engine=engine,
        callbacks=[Callback(on_round=lambda record: rounds.append(record.round))],
    )
    assert rounds == [3, 4]
    assert left_behind(tmp_path / "parts") == left_behind(whole.path)

    # the state has everything that rounds change, also if four rounds do not show it
    federation, before = federations[0]
    after = numbers(federation.strategy)
    changed = {
        name for name, value in after.items() if name not in before or not same(value, before[name])
    }
    remembered = {name.replace("_", "") for name in federation.strategy.state_dict()}
    # an argument of every step of a server optimizer; computed from the rest, once a round
    # and the columns of the head, which follow from the layout
    constant = ("._rows", "_mean", "own_head.columns", "own_head._mask")
    changed = {name for name in changed if not name.endswith(constant)}
    assert {name.replace("_", "") for name in changed} <= remembered


# ---- the directory -------------------------------------------------------------------------------


def test_baselines_resume_too(tiny, engine, tmp_path, left_behind):
    recipe = tiny("baselines=[ditto, ifca]")
    whole = federate(recipe, tmp_path / "whole", engine=engine)
    path = interrupted(recipe, tmp_path / "run", engine, 3, "ditto")
    began = []
    with pytest.raises(KeyboardInterrupt):
        resume(path, engine=engine, **stop_after(1, "ifca"))
    run = resume(
        path,
        engine=engine,
        callbacks=[
            Callback(
                on_start=lambda federation, _: began.append(
                    (federation.recipe.strategy.name, federation.completed)
                )
            )
        ],
    )
    assert began == [("ifca", 1)]
    assert left_behind(path) == left_behind(whole.path)
    assert run.ended
    assert set(run.baselines) == {"ditto", "ifca"}


def test_the_newest_two_checkpoints_are_kept_and_the_soup_is_on_the_disk_once(
    tiny, engine, tmp_path
):
    path = interrupted(tiny(), tmp_path / "run", engine, 3)
    names = sorted(found.name for found in (path / "checkpoint").iterdir())
    assert names == [
        f"round-0000{number}{part}.safetensors" for number in (2, 3) for part in ("", ".soup")
    ]
    assert (path / "soup.safetensors").samefile(
        path / "checkpoint" / "round-00003.soup.safetensors"
    )
    resume(path, engine=engine)
    assert (path / "soup.safetensors").samefile(
        path / "checkpoint" / "round-00004.soup.safetensors"
    )


def test_files_are_copied_if_they_cannot_be_linked(
    tiny, engine, tmp_path, monkeypatch, left_behind, uninterrupted
):

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    resume(interrupted(tiny(), tmp_path / "run", engine), engine=engine)
    assert not (tmp_path / "run" / "soup.safetensors").samefile(
        tmp_path / "run" / "checkpoint" / "round-00004.soup.safetensors"
    )
    assert left_behind(tmp_path / "run") == uninterrupted


def test_the_environment_records_each_resumption(tiny, engine, tmp_path):
    path = interrupted(tiny(), tmp_path / "run", engine)
    first = Run(path).environment
    again = resume(path, engine=engine).environment
    assert [(start["after_round"], start["packages"]) for start in again.pop("resumed")] == [
        (2, first["packages"])
    ]
    assert again == first


def test_files_written_after_the_checkpoint_are_undone(
    tiny, engine, tmp_path, left_behind, uninterrupted
):
    path = interrupted(tiny(), tmp_path / "run", engine, 3)
    # as if it had been interrupted just before
    (path / "checkpoint" / "round-00003.safetensors").unlink()
    (path / "checkpoint" / ".round-00003.safetensors.4711").write_text("half")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "half')
    rounds = []
    resume(
        path,
        engine=engine,
        callbacks=[Callback(on_round=lambda record: rounds.append(record.round))],
    )
    assert rounds == [3, 4]
    assert left_behind(path) == uninterrupted


@pytest.mark.parametrize("after", [0, 1])
def test_without_a_checkpoint_the_first_round_is_repeated(
    tiny, engine, tmp_path, left_behind, uninterrupted, after
):
    path = interrupted(tiny(), tmp_path / "run", engine, 1)
    shutil.rmtree(path / "checkpoint")
    if not after:
        for name in ("metrics.jsonl", "clients.json", "soup.safetensors"):
            (path / name).unlink()
    resume(path, engine=engine)
    assert left_behind(path) == uninterrupted


# ---- more rounds, and refused changes ------------------------------------------------------------


def test_an_ended_run_can_be_extended(tiny, engine, tmp_path, left_behind):
    whole = federate(
        tiny("clients.fraction=1.0", "baselines=[fedavg]"), tmp_path / "whole", engine=engine
    )
    short = federate(
        tiny("rounds=2", "clients.fraction=1.0", "baselines=[fedavg]"),
        tmp_path / "short",
        engine=engine,
    )
    with pytest.raises(
        ResumeError,
        match=(
            r"has ended: all of its 2 rounds are done\. "
            r"For more rounds: fedmerge resume .*short rounds=N"
        ),
    ):
        resume(short.path, engine=engine)
    run = resume(short.path, ["rounds=4"], engine=engine)
    assert run.recipe.rounds == 4
    for record in run.records[:2]:  # records keep the number of rounds of their time
        assert record["rounds"] == 2
    ours, theirs = left_behind(short.path), left_behind(whole.path)
    for name in ("metrics.jsonl", "baselines/fedavg/metrics.jsonl"):
        ours[name] = [{**record, "rounds": 4} for record in ours[name]]
    assert ours == theirs


@pytest.mark.parametrize(
    "override",
    ["seed=1", "training.learning_rate=0.5", "strategy=fedavg", "baselines=[local]", "lora.r=4"],
)
def test_overrides_that_would_make_another_run_are_refused(
    tiny, engine, tmp_path, left_behind, override
):
    path = interrupted(tiny(), tmp_path / "run", engine)
    before = left_behind(path)
    with pytest.raises(
        RecipeError,
        match=r"cannot be changed in a resumed run; .* change only name, rounds, evaluation\.every",
    ):
        resume(path, [override], engine=engine)
    assert left_behind(path) == before


def test_fewer_rounds_than_are_done_are_refused(tiny, engine, tmp_path):
    path = interrupted(tiny(), tmp_path / "run", engine, 3)
    with pytest.raises(RecipeError, match="rounds: 2 is less than the 3 completed rounds"):
        resume(path, ["rounds=2"], engine=engine)
    assert len(resume(path, ["rounds=3", "evaluation.every=2"], engine=engine).records) == 3


def test_an_edited_recipe_is_refused(tiny, engine, tmp_path):
    path = interrupted(tiny("strategy=ditto"), tmp_path / "run", engine)
    text = checked.read_text(path / "recipe.yaml")
    changed = text.replace("regularization: 0.1", "regularization: 0.2")
    (path / "recipe.yaml").write_text(changed)
    with pytest.raises(RunError, match=r"recipe\.yaml is damaged"):
        resume(path, engine=engine)
    checked.write_text(path / "recipe.yaml", changed)
    with pytest.raises(
        ResumeError,
        match=(
            r"has changed since round 2: strategy\.regularization was 0\.1 and is 0\.2\. "
            r"Change it back"
        ),
    ):
        resume(path, engine=engine)
    checked.write_text(path / "recipe.yaml", text)
    resume(path, engine=engine)


def test_other_clients_are_refused(tiny, engine, tmp_path):
    path = interrupted(tiny(), tmp_path / "run", engine)
    clients = checked.read_document(path / "clients.json")["clients"]
    checked.write_document(path / "clients.json", {"clients": clients[1:]})
    with pytest.raises(
        ResumeError, match=r"the data or the model have changed and no longer match clients\.json"
    ):
        resume(path, engine=engine)


def test_an_unfinished_run_is_refused_with_the_command_that_resumes_it(tiny, engine, tmp_path):
    path = interrupted(tiny(), tmp_path / "my run", engine)
    with pytest.raises(
        RunExistsError,
        match=r"already holds a run; .* Resume .* with fedmerge resume '.*my run', or .* such as",
    ):
        federate(tiny(), path, engine=engine)


def test_a_run_that_was_open_before_shows_the_new_rounds(tmp_path):
    run = federate(recipe("rounds=1"), tmp_path / "run")
    assert "1 of 1 rounds" in repr(run)
    resume(run.path, ["rounds=2"])
    assert "2 of 2 rounds" in repr(run)

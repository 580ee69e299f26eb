"""Damaged checkpoints and disk errors give one message, and the run can be resumed."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedmerge_peft import Callback, ResumeError, Run, RunError, federate, resume
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.runs import checkpoint
from fedmerge_peft.util import checked

TINY = [
    "data.max_train=4",
    "data.max_test=2",
    "evaluation.finetuned=false",
    "rounds=4",
    "clients.fraction=0.5",
    "strategy=fesem",
]
SECOND, SECOND_SOUP = "round-00002.safetensors", "round-00002.soup.safetensors"
THIRD, THIRD_SOUP = "round-00003.safetensors", "round-00003.soup.safetensors"


@pytest.fixture(scope="module")
def tiny(smoke):
    return smoke(*TINY)


@pytest.fixture(scope="module")
def engine(tiny):
    return LocalEngine.from_recipe(tiny)


@pytest.fixture(scope="module")
def uninterrupted(tiny, engine, tmp_path_factory, left_behind):
    return left_behind(
        federate(tiny, tmp_path_factory.mktemp("runs") / "whole", engine=engine).path
    )


@pytest.fixture(scope="module")
def stopped(tiny, engine, tmp_path_factory):
    """A run of three of four rounds, which tests copy."""
    path = tmp_path_factory.mktemp("runs") / "stopped"

    def stop(record):
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(tiny, path, engine=engine, callbacks=[Callback(on_round=stop)])
    return path


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def altered(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "altered": lambda content: altered(content, len(content) - 3),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, how) for name in (THIRD, THIRD_SOUP) for how in DAMAGE] + [(THIRD_SOUP, None)],
)
def test_a_damaged_checkpoint_is_named(run, tiny, caplog, name, damage):
    file = run / "checkpoint" / name
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(DAMAGE[damage](content))
    found = checkpoint.read_latest(run / "checkpoint", tiny, (run / "metrics.jsonl").read_bytes())
    assert found.manifest.round == 2
    assert name in caplog.text
    assert "Resuming from the previous checkpoint, after round 2" in caplog.text


def test_an_unfinished_round_is_no_damage(run, tiny, caplog):
    (run / "checkpoint" / THIRD).unlink()
    assert (
        checkpoint.read_latest(
            run / "checkpoint", tiny, (run / "metrics.jsonl").read_bytes()
        ).manifest.round
        == 2
    )
    assert caplog.text == ""


def test_the_previous_checkpoint_is_used_instead(run, engine, left_behind, uninterrupted):
    (run / "checkpoint" / THIRD_SOUP).write_bytes(b"torn")
    resume(run, engine=engine)
    assert left_behind(run) == uninterrupted


def test_if_all_checkpoints_are_damaged_nothing_is_deleted(run, engine):
    for name in (SECOND_SOUP, THIRD):
        (run / "checkpoint" / name).write_bytes(b"torn")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(
        ResumeError,
        match=(
            r"cannot be resumed: .*round-00003.*round-00002"
            r".*Its undamaged files are still readable"
        ),
    ):
        resume(run, engine=engine)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_missing_metrics_are_detected(run, engine, caplog, left_behind, uninterrupted):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    resume(run, engine=engine)
    assert "metrics.jsonl does not reach the end of round 3, which" in caplog.text
    assert left_behind(run) == uninterrupted


def test_a_checkpoint_of_another_adapter_is_refused(run, tiny, engine):
    found = checkpoint.read(run / "checkpoint", 3)
    tensors = {"clusters": torch.zeros(7, dtype=torch.int64)}
    checked.write_tensors(run / "checkpoint" / THIRD, tensors, json.dumps({**vars(found.manifest)}))
    with pytest.raises(
        ResumeError,
        match=r"clusters: expected a int64 tensor \(6,\), got a int64 tensor \(7,\)",
    ):
        resume(run, engine=engine)


# ---- arbitrary bytes -----------------------------------------------------------------------------
HEADER = save({"clusters": torch.zeros(6)}, {"checkpoint": "{}"})


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=400)
    | st.integers(0, 10**6).map(lambda at: altered(HEADER, at % len(HEADER)))
)
@example(HEADER)
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(save({"clusters": torch.zeros(6)}))
def test_reading_any_file_gives_a_checkpoint_or_one_error(run, content):
    for name in (THIRD, THIRD_SOUP):
        kept = (run / "checkpoint" / name).read_bytes()
        (run / "checkpoint" / name).write_bytes(content)
        with pytest.raises(RunError, match="round-00003"):
            checkpoint.read(run / "checkpoint", 3)
        (run / "checkpoint" / name).write_bytes(kept)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from([THIRD, THIRD_SOUP]))
def test_every_altered_byte_is_detected(run, at, by, name):
    file = run / "checkpoint" / name
    kept = file.read_bytes()
    at %= len(kept)
    file.write_bytes(kept[:at] + bytes([kept[at] ^ by]) + kept[at + 1 :])
    try:
        found = checkpoint.read(run / "checkpoint", 3)
    except RunError:
        return
    finally:
        file.write_bytes(kept)
    # the altered byte is in spaces of the header or in unused metadata
    whole = checkpoint.read(run / "checkpoint", 3)
    assert found.manifest == whole.manifest
    assert all(torch.equal(found.tensors[key], value) for key, value in whole.tensors.items())


# ---- the disk ------------------------------------------------------------------------------------
REFUSALS = [
    OSError(28, "No space left on device"),
    OSError(13, "Permission denied"),
    OSError(27, "File too large"),
]


@pytest.mark.parametrize(
    ("number", "error"),
    [(3, REFUSALS[0]), (20, REFUSALS[1]), (29, REFUSALS[2]), (36, REFUSALS[0]), (44, REFUSALS[1])],
)
def test_a_disk_error_is_one_message_and_the_run_can_be_resumed(
    tiny, engine, tmp_path, monkeypatch, left_behind, uninterrupted, number, error
):
    left = [number]
    sync = os.fsync

    def fsync(descriptor):
        left[0] -= 1
        if left[0] <= 0:
            raise error
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "run"
    with pytest.raises(
        RunError, match=rf"cannot be written \({error.strerror}\); finished rounds of a run"
    ):
        federate(tiny, path, engine=engine)
    with pytest.raises(RunError, match=rf"cannot be written \({error.strerror}\)"):
        resume(path, engine=engine)
    left[0] = 10**9
    assert not [file for file in path.rglob(".*") if file.is_file()]
    resume(path, engine=engine)
    assert left_behind(path) == uninterrupted


def test_a_limit_on_file_sizes_is_one_error(tiny, engine, tmp_path, left_behind, uninterrupted):
    """A limit on file sizes, which metrics.jsonl exceeds first."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    biggest = 2 * max(len(json.dumps(record)) for record in uninterrupted["metrics.jsonl"]) + 1200
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(biggest, 4000), hard))
    try:
        with pytest.raises(RunError, match=r"cannot be written .*File too large"):
            federate(tiny, tmp_path / "run", engine=engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(Run(tmp_path / "run").records) < 4
    resume(tmp_path / "run", engine=engine)
    assert left_behind(tmp_path / "run") == uninterrupted

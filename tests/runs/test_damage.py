"""A damaged run or export is harmless, repaired, or one error that names the file."""

import json
import random

import numpy as np
import pytest
import torch
from tests.runs.conftest import TINY

from fedmerge_peft import FedMergeError, RunError, load_run, resume
from fedmerge_peft.cli import main
from fedmerge_peft.runs.cleanup import files_in
from fedmerge_peft.runs.verify import verify
from fedmerge_peft.serving.export import export_all, export_soup
from fedmerge_peft.util import checked, strict_json

FLIPS = 500
DAMAGED = 300


def reading(path):
    """All content of a run directory, in a form that can be compared."""
    found = []
    run = load_run(path)
    for each in (run, *run.baselines.values()):
        best = (each.path / "best").is_dir()
        found += [each.recipe, each.environment, each.decisions, each.records, each.summary]
        found += [each.task, each.adapter_config, each.client_names, each.scores(best=best)]
        found += [each.clients.to_csv(), each.label_counts.to_csv(), each.weights.to_csv()]
        states = [each.state(), each.state(best=best)]
        found += [(soup.layout, soup.rows.tolist(), pi.tolist()) for soup, pi in states]
        found += [(number, pi.tolist()) for number, pi in each.weights_by_round()]
    return found


def attempt(call):
    """Return the result and no error, or no result and the error's message."""
    try:
        return call(), ""
    except RunError as error:
        return None, str(error)


def flipped(content, at, bit):
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def places(folder, chance, number):
    """Draw positions: half of them over all bytes, the others over all files."""
    files = sorted(path for path in files_in(folder) if path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    for trial in range(number):
        path = chance.choices(files, sizes if trial % 2 else None)[0]
        yield path, chance.randrange(path.stat().st_size), chance.randrange(8)


def test_a_single_flipped_bit_of_a_run_is_harmless_or_reported(run):
    chance, whole, told = random.Random(0), reading(run), 0
    assert verify(run) == len(files_in(run))
    for trial, (path, at, bit) in enumerate(places(run, chance, FLIPS // 2)):
        content = path.read_bytes()
        path.write_bytes(flipped(content, at, bit))
        _, error = attempt(lambda: verify(run))
        told += bool(error)
        assert path.name in error or not error
        if not error or trial % 20 == 0:  # not told: such as in the spaces of a header
            read, refused = attempt(lambda: reading(run))
            assert path.name in refused if refused else read == whole, (path, at, bit)
        path.write_bytes(content)
    assert told > 0.9 * FLIPS / 2


def test_a_single_flipped_bit_of_an_export_is_reported(run, tmp_path):
    chance, opened = random.Random(0), load_run(run)
    folders = [export_all(opened, tmp_path / "all"), export_soup(opened, tmp_path / "soup")]
    for folder in folders:
        assert verify(folder) == len(files_in(folder))
        for path, at, bit in places(folder, chance, FLIPS // 4):
            content = path.read_bytes()
            path.write_bytes(flipped(content, at, bit))
            with pytest.raises(RunError, match=path.name):
                verify(folder)
            path.write_bytes(content)


def test_an_export_of_one_client_can_be_verified_alone(run, tmp_path):
    opened = load_run(run)
    folder = export_all(opened, tmp_path / "all")
    (first, *_) = sorted(path for path in folder.iterdir() if path.is_dir())
    assert verify(first) == len(files_in(first))
    (first / "weights.json").unlink()
    (first / "more.py").touch()
    for place in (first, folder):
        with pytest.raises(RunError, match=r"weights\.json is missing\n.*more\.py is not listed"):
            verify(place)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint/round-00002.safetensors",
        "checkpoint/round-00002.soup.safetensors",
        "soup.safetensors",
        "labels.json",
        "summary.json",
        "metrics.jsonl",
    ],
)
def test_a_flipped_bit_is_repaired_or_reported_when_a_run_is_resumed(
    smoke, smoke_engine, finished, run, left_behind, name
):
    if name != "summary.json":
        (run / "summary.json").unlink()
    content = (run / name).read_bytes()
    if name == "soup.safetensors":  # no longer a link to the file of the checkpoint
        (run / name).unlink()
    (run / name).write_bytes(flipped(content, len(content) // 3, 0))
    _, error = attempt(lambda: resume(run, engine=smoke_engine.with_recipe(smoke(*TINY))))
    if name == "metrics.jsonl":
        assert "metrics.jsonl:1 is damaged" in error
    else:
        assert not error
        assert left_behind(run) == left_behind(finished)
        assert verify(run)


def test_one_digit_of_the_records_does_not_change_a_resumed_run(run, smoke, smoke_engine):
    path = run / "metrics.jsonl"
    text = path.read_text()
    at = text.index('"update_norm": ') + len('"update_norm": 0.')
    path.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1 is damaged"):
        resume(run, ["rounds=3"])


def test_verify_names_every_fault(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(run)])
    assert not stopped.value.code
    assert f"all {len(files_in(run))} files agree" in capsys.readouterr().out
    (run / "task.json").unlink()
    (run / "stray.json").write_text("{}")
    weights = run / "weights" / "round-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(run)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"{run}/task.json is missing" in error
    assert f"{run}/stray.json does not belong to the run" in error
    assert f"{weights} is damaged" in error
    assert len(error.splitlines()) == 3


# ---- JSON ----------------------------------------------------------------------------------------
DAMAGE = [
    lambda text, chance: text[: chance.randrange(len(text))],
    lambda text, chance: text.replace("{", "[", 1),
    lambda text, chance: "[" * 100_000 + "]" * 100_000,
    lambda text, chance: '{"a":' * 100_000 + "1" + "}" * 100_000,
    lambda text, chance: json.dumps(
        list(json.loads(text.split("\n")[0] if "}\n{" in text else text))
    ),
    lambda text, chance: "null",
    lambda text, chance: text.replace("1", "9" * 5000, 1),
    lambda text, chance: text.replace("1", "1e999", 1),
    lambda text, chance: text.replace("0", "NaN", 1),
    lambda text, chance: text.replace(": ", ": Infinity, ", 1),
    lambda text, chance: text.replace('{\n  "', '{\n  "format": 3,\n  "format": 3,\n  "', 1),
    lambda text, chance: text.replace('"', '"\\ud800', 1),
    lambda text, chance: text.replace('"', "'"),
    lambda text, chance: "\x00" + text,
    lambda text, chance: "",
]


@pytest.mark.slow
def test_damaged_json_is_one_error(run, tmp_path, capsys):
    chance = random.Random(0)
    files = sorted(path for path in files_in(run) if path.suffix in (".json", ".jsonl"))
    for trial in range(DAMAGED):
        path, damage = chance.choice(files), DAMAGE[trial % len(DAMAGE)]
        text = path.read_text()
        path.write_text(damage(text, chance))
        command = ["verify", str(run)]
        if trial % 3 == 1:
            command = ["scores", str(run)]
        elif trial % 5 == 2:
            command = ["export", str(run), "--soup", "--to", str(tmp_path / f"soup-{trial}")]
        elif trial % 20 == 3:
            command = ["report", str(run), "--out", str(tmp_path / "report.html")]
        with pytest.raises(SystemExit) as stopped:
            main(command)
        error = capsys.readouterr().err
        assert stopped.value.code in (None, 0, 2)
        assert "Traceback" not in error
        if command[0] == "verify" and path.read_text() != text:
            assert stopped.value.code == 2
            assert path.name in error
        path.write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "NaN",
        '{"a": 1e400}',
        '{"a": -Infinity}',
        '{"a": 1, "a": 2}',
        r'"\ud800"',
        r'{"\uDFFF": 1}',
        "1" * 5000,
        "{",
        b"\xff",
    ],
)
def test_json_is_strict(text):
    with pytest.raises(ValueError):  # noqa: PT011
        strict_json.loads(text)


def test_json_that_is_written_has_no_extensions():
    values = {
        "a": float("nan"),
        "b": [float("inf"), 1.5],
        "c": np.float32("nan"),
        "d": torch.tensor(2.0),
    }
    assert json.loads(strict_json.dumps(values, default=float), parse_constant=pytest.fail) == {
        "a": None,
        "b": ["Infinity", 1.5],
        "c": None,
        "d": 2.0,
    }


def test_scores_that_are_not_finite_are_read_back_as_nan(write_run):
    run = load_run(write_run("a", [], [[0.1, 0.2], [float("nan"), 0.5]]))
    final = run.summary["final"]["served"]
    assert "NaN" not in (run.path / "summary.json").read_text()
    assert [
        value["test_accuracy"] == value["test_accuracy"] for value in final["clients"].values()
    ] == [
        False,
        True,
    ]


def test_a_document_is_verified_to_the_byte(tmp_path):
    for document in ({}, {"a": {}}, {"a": "}\n", "ü": [1, None]}):
        checked.write_document(tmp_path / "a.json", document)
        assert checked.read_document(tmp_path / "a.json") == document
        assert json.loads((tmp_path / "a.json").read_text()).keys() == {*document, "sha256"}
        content = (tmp_path / "a.json").read_bytes()
        for at in range(len(content)):
            (tmp_path / "a.json").write_bytes(flipped(content, at, 0))
            with pytest.raises(FedMergeError, match=r"a\.json is damaged"):
                checked.read_document(tmp_path / "a.json")
